"""Depths in loops, of machine code written by hand as nvdisasm writes it."""

from tests.kernels.sass import depth

KERNEL = """
kernel:
.text.kernel:
   -:1:-:Y:02        /*0000*/                   STL [R1], R8 ;
.L_x_1:
   -:1:-:Y:02        /*0010*/                   MOV R1, R2 ;
.L_x_2:
   -:1:-:Y:05        /*0020*/              @!P1 BRA `(.L_x_8) ;
.L_x_3:
   -:1:-:Y:05        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;
   -:1:-:Y:05        /*0040*/               @P1 BRA `(.L_x_2) ;
   -:1:-:Y:05        /*0050*/                   LDL R17, [R1] ;
   -:1:-:Y:05        /*0060*/              @!P2 BRA `(.L_x_1) ;
   -:1:-:Y:05        /*0070*/                   ST.E R1, R2 ;
   -:1:-:Y:05        /*0080*/                   EXIT ;
.L_x_8:
   -:1:-:Y:05        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R7+URZ], R0 ;
   -:1:-:Y:05        /*00a0*/              @!P1 BRA `(.L_x_8) ;
   -:1:-:Y:05        /*00b0*/                   BRA `(.L_x_3) ;
.L_x_9:
   -:1:-:Y:05        /*00c0*/                   BRA `(.L_x_9) ;
"""


def test_depth():
    depths = {op: depth(KERNEL, op) for op in ("STL", "LDL", "MOV", "HGMMA", "SYNCS", "ST.E", "FADD")}
    assert depths == {"STL": 0, "LDL": 1, "MOV": 1, "HGMMA": 2, "SYNCS": 3, "ST.E": 0, "FADD": -1}
    assert depth(KERNEL, "STL", "LDL") == 1
