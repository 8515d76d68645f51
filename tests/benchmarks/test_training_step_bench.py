"""The training step benchmark: dense and S2 agree where both see all, FLOPs are exact, failures have rows."""

import pytest
from conftest import rows_in

SIZES = "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2"
TOY = ["step", "--device", "cpu", "--threads", "1", "--repeats", "2", "--warm-up", "1", *SIZES.split()]
LOSSES = (5.5, 5.4, 5.3)
IN_WINDOW, OWN_BLOCKS = (5.5, 5.4, 5.3001), (5.5, 5.4, 5.4)
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "step_code", "packages"),
    *("case", "seq_length", "device", "model", "flags", "warm_up", "repeats", "checked"),
    *("not_measured", "losses", "seconds", "flops", "dense_flops", "speedup_bound"),
    *("host_peak_bytes", "gpu_peak_bytes", "other_cpus"),
}


@pytest.fixture(scope="module")
def step(bench):
    from benchmarks import training_step

    return training_step


class Trainings:
    """Takes the place of trainings: lists (tokens, case) of what ran; `left` is what a case leaves."""

    def __init__(self, step):
        self.step, self.left, self.ran = step, {}, []

    def __call__(self, flags, warm_up, repeats, device, threads, time_optimizer):
        assert not time_optimizer
        cases = sorted(self.step.CASES.items(), key=lambda item: -len(item[1]))
        case = next(name for name, words in cases if all(word in flags for word in words[:1]))
        tokens = int(flags[flags.index("--seq-length") + 1])
        if repeats == self.step.CHECKED_STEPS - 1:
            is_whole = flags[flags.index("--s2-local-blocks") + 1] == "8"
            case = f"{case} check" if is_whole else "own blocks"
        self.ran.append((tokens, case))
        left = {
            "status": 0,
            "output": "",
            "losses": OWN_BLOCKS if case == "own blocks" else IN_WINDOW if case == "s2 check" else LOSSES,
            "step_seconds": (0.4, 0.4) if case == "dense" else (0.1, 0.1),
            "host_peak_bytes": 2**30,
        }
        if isinstance(self.left.get(case), BaseException):
            raise self.left[case]
        return self.step.Training(**(left | self.left.get(case, {})))


@pytest.fixture
def trainings(step, monkeypatch):
    fakes = Trainings(step)
    monkeypatch.setattr(step, "train", fakes)
    return fakes


CHECK = [(128, "dense check"), (128, "s2 check"), (128, "own blocks")]


def test_every_row_says_all_there_is_to_say(bench, step, trainings, tmp_path, capsys):
    assert bench.main([*TOY, "--seq-lengths", "256,512", "--out", str(tmp_path)]) == 0
    check, *rows = rows_in(tmp_path)
    timed = [(tokens, case) for tokens in (256, 512) for case in ("dense", "s2-first-two-dense", "s2")]
    assert trainings.ran == CHECK + timed, "the check comes first, once"
    assert (check["case"], check["seq_length"], check["seconds"]) == ("check", 128, None)
    assert [(row["seq_length"], row["case"]) for row in rows] == timed
    for row in rows:
        assert row.keys() == KEYS
        assert row["checked"] == check["checked"] and row["checked"]["seq_length"] == 128
        assert row["checked"]["losses"]["s2"] == list(IN_WINDOW)
        assert row["checked"]["s2_off"] == pytest.approx(1e-4 / 3**0.5)
        assert row["checked"]["own_blocks_off"] == pytest.approx(0.1 / 3**0.5)
        assert row["losses"] == list(LOSSES) and row["not_measured"] is None
        assert row["speedup_bound"] == sum(row["dense_flops"].values()) / sum(row["flops"].values())
        assert "--recompute-granularity full" in " ".join(row["flags"]) and "--bf16" in row["flags"]
    table = capsys.readouterr().out
    assert table.count("4.00x") == 4 and f"{rows[5]['speedup_bound']:.2f}x" in table
    assert f"{256 / 0.1:.0f}" in table and "1024 MiB" in table
    assert bench.main(["plot", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("step.png")


def test_what_is_stored_is_not_measured_again(bench, step, trainings, tmp_path, monkeypatch):
    options = [*TOY, "--out", str(tmp_path), "--cases"]
    assert bench.main([*options, "s2", "--seq-lengths", "256"]) == 0
    assert bench.main([*options, "dense", "s2", "--seq-lengths", "256,512"]) == 0
    assert trainings.ran == [*CHECK, (256, "s2"), (256, "dense"), (512, "dense"), (512, "s2")]
    monkeypatch.setattr(step, "code_hash", lambda patterns: "other")
    assert bench.main([*options, "s2", "--seq-lengths", "256"]) == 0
    assert trainings.ran[7:] == [*CHECK, (256, "s2")]


def test_cases_are_measured_in_the_order_asked_for_and_the_check_but_once(bench, trainings, tmp_path):
    options = [*TOY, "--seq-lengths", "256", "--out", str(tmp_path), "--cases"]
    trainings.left["s2"] = KeyboardInterrupt()
    assert bench.main([*options, "s2", "dense"]) == 130
    assert [row["case"] for row in rows_in(tmp_path)] == ["check"]
    trainings.left.clear()
    assert bench.main([*options, "s2", "dense"]) == 0
    assert trainings.ran == [*CHECK, (256, "s2"), (256, "s2"), (256, "dense")]


def test_without_memory_there_is_a_row_and_the_others_go_on(bench, trainings, tmp_path, capsys):
    full = "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64 GiB\n"
    trainings.left["dense"] = {"status": 1, "output": full, "losses": ()}
    assert bench.main([*TOY, "--seq-lengths", "256", "--out", str(tmp_path)]) == 0
    _, dense, *others = rows_in(tmp_path)
    assert dense["not_measured"] == "out of memory" and dense["seconds"] is None
    assert len(others) == 2 and all(row["seconds"] for row in others)
    out = capsys.readouterr().out
    assert "not measured: out of memory" in out and out.count(" - ") == 2, "no speed-up without its base"


WRONG = {
    "other losses in the window": (
        "s2 check",
        {"losses": (5.5, 5.4, 5.32)},
        "losses are 0.0115 off dense ones",
    ),
    "no number in the window": (
        "s2 check",
        {"losses": (5.5, float("nan"), 5.3)},
        "losses are nan off dense ones",
    ),
    "a check that sees nothing": ("own blocks", {"losses": LOSSES}, "allowed is 0.1 of 0, by which"),
    "no number": ("s2", {"losses": (5.5, float("inf"), 5.3)}, "s2 at 256 tokens: losses must be finite"),
    "failed": ("s2", {"status": 1, "output": "E\nKeyError: 3"}, "ended with status 1: KeyError: 3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_has_a_row_without_times_and_the_others_go_on(
    bench, trainings, tmp_path, capsys, wrong
):
    which, left, said = WRONG[wrong]
    trainings.left[which] = left
    options = [*TOY, "--seq-lengths", "256", "--cases", "s2", "dense", "--out", str(tmp_path)]
    for _ in range(2):
        assert bench.main(options) == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: wrong: ") and said in err
        assert f"not measured: wrong: {'' if which == 's2' else 's2 at 128'}" in out and "4.00x" not in out
        _, s2, dense = rows_in(tmp_path)
        assert s2["seconds"] is None and said in s2["not_measured"] and dense["seconds"]
        assert ("unproven_seconds" in s2) == (which != "s2")
    assert len(trainings.ran) == 5, "what is wrong is not trained again by the same code"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--local-blocks", "1"],
            "--local-blocks 1: must be >= 2, for the check in the window to show anything",
        ),
        (["--num-layers", "0"], "--num-layers 0: must be >= 1"),
        (["--seq-lengths", "256,0"], "--seq-lengths 0: must be >= 1"),
        (["--repeats", "0"], "--repeats 0: must be >= 1"),
        (["--warm-up", "0"], "--warm-up 0: must be >= 1, the first step compiles"),
        (["--hidden-size", "65"], "--hidden-size 65: must be a multiple of --num-attention-heads 4"),
        (["--num-query-groups", "3"], "--num-attention-heads 4: must be a multiple of --num-query-groups 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_by_name(bench, trainings, tmp_path, capsys, options, said):
    assert bench.main([*TOY, "--seq-lengths", "256", "--out", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == f"error: {said}\n" and trainings.ran == []


# What is measured.


def test_the_model_on_a_gpu_is_that_of_the_record(step):
    model = step.MODELS["cuda"]
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups) == (
        *(24, 2048, 16, 4),
    )
    assert (model.block_size, model.local_blocks, model.vert_stride) == (64, 8, 16)
    assert step.LENGTHS["cuda"] == [8192, 32768, 65536, 131072]
    assert not model.settings("dense").sparse_layers
    assert model.settings("s2-first-two-dense").sparse_layers == list(range(3, 25))
    assert len(model.settings("s2").sparse_layers) == 24


def test_flops_of_products_are_megatrons_and_a_recomputed_forward(step):
    from megatron.training.training import num_floating_point_operations
    from megatron_arguments import parse

    model, tokens = step.MODELS["cuda"], 8192
    args = parse(model.flags("dense", tokens))
    args.kv_channels = model.head_dim
    args.padded_vocab_size = model.vocab_size
    layers = 24 * (2048 * (2 * 2048 + 2 * 4 * 128) + 3 * 2048 * 6144)
    without_attention = num_floating_point_operations(args, 1, 0, tokens)
    assert step.step_flops(model, "dense", tokens)["linear"] == without_attention + 2 * tokens * layers


def test_flops_of_attention_are_those_of_the_visible_pairs(step):
    """Forward twice, for the recomputation, at 4 FLOPs a pair and element; backward once, at 10."""
    model, tokens = step.MODELS["cpu"], 512
    pairs = {
        case: sum(sum(model.settings(case).pattern(layer).visible_pairs(tokens)) for layer in (1, 2, 3, 4))
        for case in step.CASES
    }
    assert pairs["dense"] == 4 * 2 * tokens * (tokens + 1) // 2
    assert pairs["s2"] < pairs["s2-first-two-dense"] < pairs["dense"]
    for case, count in pairs.items():
        heads_of_a_group = 2
        assert step.step_flops(model, case, tokens)["attention"] == 18 * 16 * heads_of_a_group * count
