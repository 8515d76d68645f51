"""What README and docs/quality.md say of a pretrained model made sparse is what stored rows say."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m"


def page(name: str) -> str:
    """Text of a page, its line breaks as spaces."""
    return " ".join((ROOT / name).read_text().split())


def rows_of(benchmark: str, **asked) -> list[dict]:
    """Stored rows with what is asked for, oldest first."""
    files = (ROOT / "benchmarks" / "results").glob(f"*/{benchmark}-*.jsonl")
    rows = [json.loads(line) for file in files for line in file.open()]
    asked = {"model": MODEL, "dtype": "bfloat16", **asked}
    return sorted((row for row in rows if asked.items() <= row.items()), key=lambda row: row["date"])


def found(row: dict, length: int, among: dict | None = None) -> int:
    """Number of needles found in texts of a length, of those that another row found."""
    other = row if among is None else among
    pairs = zip(row["needles"], other["needles"], strict=True)
    return sum(a["found"] and b["found"] for a, b in pairs if a["length"] == length)


def trained(variant: str, pattern: str) -> dict:
    return rows_of("quality", experiment="continue", size="0.5M", variant=variant, pattern=pattern)[-1]


def test_the_readme_says_what_a_pattern_costs_untrained():
    of_loss = {"seq_length": 4096, "texts": 32, "kinds": ["code"], "data": "held-out_text_document"}
    calibrated, uniform, dense = (
        rows_of("patterns", pattern=name, **of_loss)[-1]
        for name in ("text-0.194", "uniform w8 v16 s1", "dense")
    )
    counts = [sum(needle["found"] for needle in row["needles"]) for row in (calibrated, uniform, dense)]
    assert counts == [8, 1, 10]
    assert (
        f"with {calibrated['kv']:.2f} of the keys and values loses {calibrated['over_dense']:.3f} nats per "
        f"token at 4096 tokens, and finds 8 of 10 codes hidden in the text; a uniform one of that size loses "
        f"{uniform['over_dense']:.3f} and finds one; dense attention finds all"
    ) in page("README.md")


def test_readme_and_quality_page_say_what_generation_takes():
    rows = [
        rows_of("generation", prompt=8000, pattern=name)[-1]
        for name in ("dense, transformers", "uniform w8 v16 s1", "text-0.194")
    ]
    told = [
        (
            row["prefill_seconds"]["median"],
            1000 * row["decode_seconds"]["median"] / row["decoded_tokens"],
            row["cache_bytes"] / 2**20,
        )
        for row in rows
    ]
    (prefill, token, cache), _, (ours_prefill, ours_token, ours_cache) = told
    assert (
        f"its cache has {ours_cache:.1f} MiB instead of {cache:.1f}, prefill takes {ours_prefill:.1f} s "
        f"instead of {prefill:.1f}, and a further token {ours_token:.0f} ms instead of {token:.0f}"
    ) in page("README.md")
    for prefill, token, cache in told:
        assert f"| {prefill:.2f} s | {token:.1f} ms | {cache:.1f} MiB |" in page("docs/quality.md")


def test_readme_and_quality_page_say_what_training_leaves():
    dense = trained("dense", "dense")
    quality = page("docs/quality.md")
    told = re.findall(r"\| calibrated \(`(\S+)`\) \| (\S+) \| (\S+) \| (\S+)% \| (.*?) \| (.*?) \|", quality)
    assert told
    for pattern, kv, loss, over, needles, shares in told:
        row = trained("calibrated", pattern)
        assert (kv, loss) == (f"{row['kv']:.3f}", f"{row['loss']:.4f}")
        assert over == f"{100 * (row['loss'] / dense['loss'] - 1):+.2f}"
        assert needles == f"{found(row, 4096)} of 80 / {found(row, 8192)} of 40"
        of_dense = [found(row, length, dense) / found(dense, length) for length in (4096, 8192)]
        assert shares == " / ".join(f"{share:.0%}" for share in of_dense)
    assert (
        f"| dense | 1 | {dense['loss']:.4f} | | {found(dense, 4096)} of 80 / {found(dense, 8192)} of 40 | |"
    ) in quality
    row = trained("calibrated", "b195-m2")
    assert (
        "Trained on for 0.5M tokens, another calibrated pattern of that size, for which needles "
        "weighed more, has "
        f"{100 * (row['loss'] / dense['loss'] - 1):.1f}% more loss than the dense model trained on the same "
        f"tokens, and finds {found(row, 4096, dense) / found(dense, 4096):.0%} of the needles that it finds "
        "in 4096 tokens"
    ) in page("README.md")
