"""Plans optimizer offload: the step time of our schedule and of others at given rates, and what limits it.

Needs no GPU. Rates are per rank, those that the ranks reach while all of them work. GB are 10**9 bytes.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are part of the checkout only

from benchmarks.offload_schedules import as_json, compare, table
from megatron_s2.data.command import CommandParser
from megatron_s2.errors import flag_name
from megatron_s2.offload.model import Rates
from megatron_s2.offload.plan import GB, SUBGROUP_SIZE
from megatron_s2.offload.simulator import Simulation
from megatron_s2.report.figure import check_picture

SUFFIX_FACTORS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        check(args)
        if args.plot:
            check_picture("--plot", args.plot)
        rates = rates_from(args)
        simulations = simulated(args, rates)
        if args.plot:
            plot(args, simulations)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    given = (simulations, rates, args.backward_seconds)
    print(json.dumps(as_json(*given), indent=1) if args.json else table(*given))


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step = parser.add_argument_group("the step").add_argument
    step(
        "--params",
        type=parameters,
        required=True,
        metavar="N",
        help="parameters whose optimizer state the rank holds: 7e9, 7B, 875M",
    )
    step(
        "--backward-seconds",
        type=float,
        metavar="S",
        help="of the last micro-batch; default: long enough to hide a flush of gradients",
    )
    rate = parser.add_argument_group("rates").add_argument
    rate("--h2d-gbps", type=float, required=True, metavar="X", help="host to GPU, GB/s (bytes, not bits)")
    rate("--d2h-gbps", type=float, required=True, metavar="X", help="GPU to host, GB/s")
    rate("--cpu-gparams", type=float, required=True, metavar="X", help="updates on the CPU, 10**9 params/s")
    rate("--gpu-gparams", type=float, required=True, metavar="X", help="updates on the GPU, 10**9 params/s")
    rate(
        "--dram-gbps",
        type=float,
        metavar="X",
        help="reads and writes of host memory together, GB/s; leave it out for rates measured all at once",
    )
    rate("--nvme-read-gbps", type=float, metavar="X", help="GB/s of all directories together")
    rate("--nvme-write-gbps", type=float, metavar="X", help="GB/s of all directories together")
    place = parser.add_argument_group("placement; the flags of a training are understood, too").add_argument
    place(
        "--gpu-fraction",
        "--s2-offload-gpu-fraction",
        type=fraction,
        default=None,
        metavar="auto|0..1",
        help="what the GPU updates of the state that is not resident on it (default: auto)",
    )
    place(
        "--subgroup-size",
        "--s2-offload-subgroup-size",
        type=int,
        default=SUBGROUP_SIZE,
        metavar="N",
        help="parameters of a subgroup (default: %(default)s)",
    )
    place(
        "--gpu-budget-gb",
        "--s2-offload-gpu-budget-gb",
        type=float,
        default=0.0,
        metavar="X",
        help="state that may stay on the GPU, GB (default: %(default)s)",
    )
    place(
        "--host-budget-gb",
        "--s2-offload-host-budget-gb",
        type=float,
        metavar="X",
        help="host memory for state and gradients, GB; the rest goes to NVMe (default: no limit)",
    )
    output = parser.add_argument_group("output").add_argument
    output("--json", action="store_true", help="JSON instead of the table")
    output("--plot", metavar="FILE", type=Path, help="draw the timelines to a .png or .svg")
    return parser


def parameters(text: str) -> int:
    factor = SUFFIX_FACTORS.get(text[-1:].upper(), 1)
    number = float(text if factor == 1 else text[:-1]) * factor
    if not number.is_integer():
        raise ValueError
    return int(number)


def fraction(text: str) -> float | None:
    return None if text == "auto" else float(text)


def check(args: argparse.Namespace) -> None:
    for name in ("gpu_budget_gb", "host_budget_gb"):
        if not math.isfinite(getattr(args, name) or 0):
            raise ValueError(f"{flag_name(name)} {getattr(args, name)}: must be a finite number")
    if args.params < 1:
        raise ValueError(f"--params {args.params}: must be >= 1")
    if args.backward_seconds is not None and not 0 <= args.backward_seconds < math.inf:
        raise ValueError(f"--backward-seconds {args.backward_seconds}: must be >= 0")


def rates_from(args: argparse.Namespace) -> Rates:
    given = {
        "cpu": "cpu_gparams",
        "gpu": "gpu_gparams",
        "h2d": "h2d_gbps",
        "d2h": "d2h_gbps",
        "dram": "dram_gbps",
        "nvme_read": "nvme_read_gbps",
        "nvme_write": "nvme_write_gbps",
    }
    values = {name: getattr(args, flag) for name, flag in given.items()}
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag_name(given[name])} {value}: must be a positive number")
    if (args.nvme_read_gbps is None) != (args.nvme_write_gbps is None):
        raise ValueError("--nvme-read-gbps and --nvme-write-gbps: must be given together")
    return Rates(**{name: value and value * 1e9 for name, value in values.items()})


def simulated(args: argparse.Namespace, rates: Rates) -> dict[str, Simulation]:
    host = args.host_budget_gb
    return compare(
        args.params,
        rates,
        fraction=args.gpu_fraction,
        backward_seconds=args.backward_seconds,
        subgroup_size=args.subgroup_size,
        gpu_budget=int(args.gpu_budget_gb * GB),
        host_budget=None if host is None else int(host * GB),
    )


def plot(args: argparse.Namespace, simulations: dict[str, Simulation]) -> None:
    from megatron_s2.report.offload_timeline import draw_timelines

    draw_timelines(
        {name: one.events for name, one in simulations.items()},
        args.plot,
        title=f"The update of {args.params} parameters",
        captions={
            name: f"{one.step_seconds:.3f} s after backward; {one.bottleneck}"
            for name, one in simulations.items()
        },
    )


if __name__ == "__main__":
    sys.exit(main())
