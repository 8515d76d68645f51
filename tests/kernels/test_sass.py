"""What is read from machine code, and that the throughput model predicts a published number."""

import pytest
from lib import sass, throughput

TEXT = """
.L_x_0:
        /*0100*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], !UPT ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0120*/              @!P1 MUFU.EX2 R5, R6 ;
        /*0130*/                   LDL R5, [R1+0x10] ;
        /*0140*/                   DEPBAR.LE SB0, 0x2 ;
        /*0150*/               @P0 BRA `(.L_x_0) ;
        /*0160*/                   EXIT ;
.L_x_1:
        /*0170*/                   SYNCS.PHASECHK.TRANS64 P0, [UR4], R2 ;  // a second try, out of line
        /*0180*/              @!P0 BRA `(.L_x_1) ;
        /*0190*/                   BRA `(.L_x_0) ;
"""


def test_a_loop_is_what_one_of_its_iterations_executes():
    code = sass.parse(TEXT)
    (loop,) = code.loops
    assert loop.size == 6 and code.straight == 1
    assert (loop.exponentials, loop.local, loop.waits, loop.ahead) == (1, 1, 1, 2)
    assert loop.products == {"64x64x16": 1} and loop.tensor_flops == 2 * 64 * 64 * 16


def test_copies_by_descriptor_are_as_far_ahead_as_they_were_issued_before_the_loop():
    copy = "        /*00{}0*/                   UTMALDG.4D [UR8], [UR4] ;\n"
    for before, ahead in ((1, 0), (3, 2)):
        text = "".join(map(copy.format, range(before))) + TEXT.replace(
            "DEPBAR.LE SB0, 0x2", "UTMALDG.4D [UR8]"
        )
        (loop,) = sass.parse(text).loops
        assert (loop.boxes, loop.ahead) == (1, ahead)


def test_an_outer_loop_is_not_an_innermost_one():
    outer = TEXT.replace("/*0160*/                   EXIT", "/*0160*/ @P2 BRA `(.L_x_9)")
    code = sass.parse(".L_x_9:\n        /*00f0*/                   NOP ;" + outer)
    assert [loop.size for loop in code.loops] == [6]


def test_the_model_predicts_a_published_number(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput.triton.knobs.cache, "dir", str(tmp_path))
    predicted = throughput.predicted_probe(throughput.probe())
    assert predicted == pytest.approx(throughput.PROBE_TFLOPS, rel=throughput.TOLERANCE)
