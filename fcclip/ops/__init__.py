"""Multi-scale deformable attention: one operator, one dispatcher, its engines.

ms_deform_attn.py  ms_deform_attn, ENGINES and select_engine: the operator and the choice of its engine
torch_engine.py    the plain PyTorch engine, the truth that every other engine is tested against
"""

from fcclip.ops.ms_deform_attn import ENGINES, ms_deform_attn, select_engine

__all__ = ["ENGINES", "ms_deform_attn", "select_engine"]
