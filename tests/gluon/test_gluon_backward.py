import torch, pytest
from oracles import packed_inputs, with_alibi
from simulated_gradients import check
from maskattn.kernels.gluon.configs import GRADIENT, GradientConfig
from maskattn.kernels.tables.lookup import padded_width

@pytest.mark.parametrize("w", [64,128])
@pytest.mark.parametrize("bias", [None,"per_head"])
@pytest.mark.parametrize("alibi", [False,True])
def test_x(w,bias,alibi):
    L=[65,3,150]
    x=packed_inputs(L, heads=2, head_width=w, dtype=torch.bfloat16, bias=bias)
    check(with_alibi(x) if alibi else x, L, L, GRADIENT[w])
