"""A refusal prints one line, on the rank that can: rank 0, else the first of the node, else this one."""

import pytest

from megatron_s2.training import refusal


@pytest.mark.parametrize(
    ("rank", "local_rank", "waited", "said"),
    [(0, 0, [], "error: bad"), (8, 0, [1], "error: bad (on rank 8)"), (3, 3, [2], "error: bad (on rank 3)")],
    ids=["rank 0", "first of its node", "another"],
)
def test_the_message_is_printed_by_whoever_has_it(monkeypatch, capsys, rank, local_rank, waited, said):
    slept = []
    monkeypatch.setattr(refusal, "rank", lambda: rank)
    monkeypatch.setattr(
        refusal.time, "sleep", lambda seconds: slept.append(seconds / refusal._MESSAGE_SECONDS)
    )
    monkeypatch.setattr(refusal.signal, "signal", lambda *_: None)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit) as ended:
        refusal.refuse("bad")
    assert ended.value.code == 2 and slept == waited
    assert capsys.readouterr().err.splitlines() == [said]
