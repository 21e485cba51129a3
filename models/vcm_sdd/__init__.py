"""VCM-SDD, the two-stream video classifier of Gong and Li (2022): `vcm_sdd(num_classes=400)` builds it.

`vcm_sdd_x` puts another head on the same two backbones (vcm_sdd.ordered).
"""

from vcm_sdd.network import VCMSDD, vcm_sdd, vcm_sdd_r101
from vcm_sdd.options import Options
from vcm_sdd.ordered import VCMSDDX, vcm_sdd_x

__all__ = ["VCMSDD", "VCMSDDX", "Options", "vcm_sdd", "vcm_sdd_r101", "vcm_sdd_x"]
