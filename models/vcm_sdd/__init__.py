"""VCM-SDD, the two-stream video classifier of Gong and Li (2022): `vcm_sdd(num_classes=400)` builds it."""

from vcm_sdd.network import VCMSDD, vcm_sdd, vcm_sdd_r101
from vcm_sdd.options import Options

__all__ = ["VCMSDD", "Options", "vcm_sdd", "vcm_sdd_r101"]
