"""The CPU's kernels of Transformer Engine's extension against plain torch, hand-made tables and its own NVFP4 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from llama2_lora.training.cpu import blocks, cpu_platform, device, dtypes, nvfp4, per_tensor
from llama2_lora.training.cpu.dtypes import DType
from llama2_lora.training.model import FP8_WEIGHT_SCALE

FP8 = [(DType.kFloat8E4M3, torch.float8_e4m3fn), (DType.kFloat8E5M2, torch.float8_e5m2)]


@pytest.fixture(params=[device.HOPPER, device.BLACKWELL], ids=["hopper", "blackwell"])
def capability(request: pytest.FixtureRequest):
    with cpu_platform(request.param):
        yield request.param


@pytest.fixture
def platform():
    with cpu_platform():
        yield


def values(*shape: int, spread: float = 1.0) -> torch.Tensor:
    """Gaussian, with rows of other sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(len(shape))
    rows = 2.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    return torch.randn(shape, generator=generator) * rows * spread


# One scale per tensor ---------------------------------------------------------------------------------------------


def delayed(dtype: DType, scale: float = 1.0, **usage: bool):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    return Float8Quantizer(torch.tensor([scale]), torch.zeros(1), dtype, **usage)


@pytest.mark.parametrize(("dtype", "fp8"), FP8)
def test_fp8_is_torchs_cast_and_saturates(dtype: DType, fp8: torch.dtype, platform) -> None:
    x = values(64, 32, spread=100.0)
    x[0, :4] = torch.tensor([1e9, -1e9, 0.0, 2.0**-20])
    quantizer = delayed(dtype, scale=8.0)
    made = quantizer(x)
    limit = torch.finfo(fp8).max
    expected = (x * 8.0).clamp(-limit, limit).to(fp8)
    assert torch.equal(made._data.view(fp8).float(), expected.float())
    assert torch.equal(made.dequantize(), expected.float() / 8.0)
    assert quantizer.amax.item() == x.abs().max()
    quantizer(x / 2)
    assert quantizer.amax.item() == x.abs().max()  # the largest of all casts since the last step


def test_copies_are_those_that_the_part_reads(capability) -> None:
    """Hopper's FP8 products want a transpose for dgrad; Blackwell's read the one copy in any layout."""
    x = values(32, 16)
    both, rows = delayed(DType.kFloat8E4M3)(x), delayed(DType.kFloat8E4M3, columnwise=False)(x)
    assert rows._transpose is None
    if capability == device.BLACKWELL:
        assert both._transpose is None
    else:
        assert torch.equal(both._transpose, both._data.t())
    columns = delayed(DType.kFloat8E4M3, rowwise=False)(x)
    assert (columns._data is None) == (capability == device.HOPPER)


def test_a_product_without_its_copy_is_an_error(platform) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    weight, x = delayed(DType.kFloat8E4M3, columnwise=False)(values(32, 16)), values(48, 32)
    with pytest.raises(RuntimeError, match="no copy by columns"):
        general_gemm(weight, x, torch.empty(1), torch.float32, layout="NN")


def test_current_scaling_fills_the_type(platform) -> None:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    x = values(32, 16)
    made = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, torch.device("cpu"))(x)
    assert made._data.view(torch.float8_e4m3fn).float().abs().max() == 448
    assert (made.dequantize() - x).abs().max() <= x.abs().max() * 2**-4
    assert torch.equal(Float8CurrentScalingQuantizer(DType.kFloat8E4M3, torch.device("cpu"))(x * 0).dequantize(), x * 0)


@pytest.mark.parametrize(
    ("algorithm", "scale"),  # 448 / amax: the history's largest, or the newest
    [("max", [448 / 8, 448 / 5, 3.0]), ("most_recent", [448 / 2, 448 / 5, 3.0])],
)
def test_the_amax_history_moves_up(algorithm: str, scale: list[float]) -> None:
    history = torch.tensor([[2.0, 5.0, 0.0], [8.0, 1.0, 0.0], [4.0, 3.0, 0.0]])  # newest, oldest, next; one column a tensor
    scales = torch.full((3,), 3.0)
    per_tensor.fused_amax_and_scale_update_after_reduction(
        torch.tensor([2.0, 5.0, 0.0]), [history], [scales], algorithm, DType.kFloat8E4M3, 0.0
    )
    assert scales.tolist() == pytest.approx(scale)
    assert history.tolist() == [[0, 0, 0], [4, 3, 0], [2, 5, 0]]


def test_fp8_weights_of_the_70b_keep_their_digits() -> None:
    """Llama-2-70B's are about N(0, 0.01 to 0.03). At a scale of 1 most lie where e4m3 has lost digits; at 64 none matter."""

    def rounding(sigma: float, scale: float) -> float:
        weights = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * sigma
        kept = per_tensor.cast_fp8(weights * scale, torch.float8_e4m3fn).view(torch.float8_e4m3fn).float() / scale
        return ((kept - weights).pow(2).mean().sqrt() / sigma).item()

    for sigma in (0.01, 0.02, 0.03):
        ideal = rounding(sigma, 448 / (5 * sigma))
        assert ideal == pytest.approx(0.0265, abs=0.0005)
        assert rounding(sigma, FP8_WEIGHT_SCALE) == pytest.approx(ideal, abs=0.0005)
    assert rounding(0.01, 1.0) > 0.05


# Block scaling, MXFP8 and NVFP4 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "exponent"), [(0.0, 0), (1.0, 127), (1.01, 128), (2.0, 128), (2.0**-126, 1), (3e38, 254)])
def test_e8m0_is_rounded_up(value: float, exponent: int) -> None:
    assert blocks.to_e8m0(torch.tensor([value])).item() == exponent


@pytest.mark.parametrize(("dtype", "fp8"), FP8)
def test_mxfp8_scales_32_values_by_a_power_of_two(dtype: DType, fp8: torch.dtype, platform) -> None:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    x = values(64, 96)
    made = MXFP8Quantizer(dtype)(x)
    by_rows, by_columns = blocks.mxfp8_values(made, True), blocks.mxfp8_values(made, False)
    for found, turned in ((by_rows, x), (by_columns.t(), x.t())):
        block = turned.reshape(turned.shape[0], -1, 32)
        scale = 2.0 ** torch.ceil(torch.log2(block.abs().amax(-1, keepdim=True) / torch.finfo(fp8).max))
        expected = (block / scale).to(fp8).float() * scale
        assert torch.equal(found, expected.view(turned.shape))
    assert torch.equal(made.dequantize(), by_rows)


@pytest.mark.parametrize(("dimensions", "compact"), [(1, False), (1, True), (2, False)])
def test_block_scaling_scales_128_values(dimensions: int, compact: bool, platform) -> None:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    x = values(256, 192)  # 192: the last block is half
    quantizer = Float8BlockQuantizer(
        DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=dimensions, all_gather_usage=compact
    )
    made = quantizer(x)
    by_rows, by_columns = blocks.blockwise_values(made, True), blocks.blockwise_values(made, False)
    if dimensions == 2:
        assert torch.equal(by_rows, by_columns)
    for found, turned in ((by_rows, x), (by_columns.t(), x.t())):
        for start in range(0, turned.shape[1], 128):
            block = turned[:128, start : start + 128] if dimensions == 2 else turned[:1, start : start + 128]
            scale = 2.0 ** torch.floor(torch.log2(448 / block.abs().max()))
            expected = (block * scale).to(torch.float8_e4m3fn).float() / scale
            assert torch.equal(found[: block.shape[0], start : start + 128], expected)


@pytest.mark.parametrize(("square", "hadamard"), [(False, False), (True, False), (False, True)], ids=["1d", "2d", "hadamard"])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0])
def test_nvfp4_is_transformer_engines_reference(square: bool, hadamard: bool, spread: float) -> None:
    from transformer_engine.pytorch.experimental.quantization_nvfp4 import NVFP4QuantizerRef
    from transformer_engine.pytorch.experimental.utils import Fp4Formats
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    x = values(64, 96, spread=spread)
    x[0, :7] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * spread  # ties
    x[0, 7] = 6.0 * spread
    with cpu_platform(device.BLACKWELL):
        made = NVFP4Quantizer(with_rht=hadamard, with_post_rht_amax=hadamard, with_2d_quantization=square)(x)
        tile = (16, 16) if square else (1, 16)
        expected = NVFP4QuantizerRef(Fp4Formats.E2M1, quant_tile_shape=tile, with_rht=hadamard).quantize(x)
    for data, scale, want, want_scale in (
        (made._rowwise_data, made._rowwise_scale_inv, expected.data, expected.scale),
        (made._columnwise_data, made._columnwise_scale_inv, expected.data_t, expected.scale_t),
    ):
        assert torch.equal(data, want)
        assert torch.equal(scale[: want_scale.shape[0], : want_scale.shape[1]], want_scale.view(torch.uint8))
    assert torch.equal(made._amax_rowwise, expected.global_amax_row)
    assert torch.equal(made._amax_columnwise, expected.global_amax_col)


def test_nvfp4_rounds_stochastically_to_neighbours_and_without_bias() -> None:
    torch.manual_seed(0)
    levels = torch.cat((-nvfp4.E2M1.flip(0), nvfp4.E2M1))
    x = torch.linspace(-6, 6, 160).repeat(2000, 1)
    amax = torch.tensor([6.0 * 448])  # the blocks' scales are then 1 where a block's amax is 6
    x[:, ::16] = 6.0
    packed, scales = nvfp4.to_fp4(x, amax, square_blocks=False, stochastic=True)
    found = nvfp4.from_fp4(packed, scales, amax)
    index = torch.searchsorted(levels, x[0]).clamp(1, len(levels) - 1)
    below, above = levels[index - 1], levels[index]
    assert bool(((found == below) | (found == above) | (found == x[0])).all())
    assert (found.mean(0) - x[0]).abs().max() < 0.06  # two units in the last place are 2; the mean of 2,000 is within 5 sigma


# Products, norms, attention, rotary embeddings, optimizer ---------------------------------------------------------


def test_products_of_all_layouts(platform) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    weight, x, gradient = values(48, 32), values(3, 5, 32), values(3, 5, 48)
    bias, workspace = values(48), torch.empty(1)
    forward, *_ = general_gemm(weight, x, workspace, torch.float32, layout="TN", bias=bias)
    assert torch.allclose(forward, x @ weight.t() + bias, rtol=0, atol=1e-4)
    dgrad, *_ = general_gemm(weight, gradient, workspace, torch.float32, layout="NN", grad=True)
    assert torch.allclose(dgrad, gradient @ weight, rtol=0, atol=1e-4)
    out = values(48, 32)
    expected = out + gradient.reshape(-1, 48).t() @ x.reshape(-1, 32)
    wgrad, bias_gradient, *_ = general_gemm(
        x, gradient, workspace, torch.float32, layout="NT", grad=True, out=out, accumulate=True, bias=bias
    )
    assert wgrad is out
    assert torch.allclose(out, expected, rtol=0, atol=1e-3)
    assert torch.allclose(bias_gradient, gradient.reshape(-1, 48).sum(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8", "nvfp4"])
def test_products_of_quantized_operands(recipe: str) -> None:
    """Both products of a frozen layer equal those of the dequantized copies, and are near those of the originals."""
    with cpu_platform(device.BLACKWELL if recipe in ("mxfp8", "nvfp4") else device.HOPPER):
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        weight, x, gradient = values(128, 256), values(64, 256), values(64, 128)
        quantizers = {"weight": make_quantizer(recipe, 2), "other": make_quantizer(recipe, 1)}
        w, a, g = quantizers["weight"](weight), quantizers["other"](x), quantizers["other"](gradient)
        workspace = torch.empty(1)
        forward, *_ = general_gemm(w, a, workspace, torch.float32, layout="TN")
        dgrad, *_ = general_gemm(w, g, workspace, torch.float32, layout="NN")
        assert torch.allclose(forward, a.dequantize() @ w.dequantize().t(), rtol=1e-4, atol=1e-2)
        near = 0.2 if recipe == "nvfp4" else 0.06
        for found, exact in ((forward, x @ weight.t()), (dgrad, gradient @ weight)):
            assert (found - exact).norm() < near * exact.norm()


def make_quantizer(recipe: str, block_dimensions: int):
    from transformer_engine.pytorch import tensor as te

    if recipe == "delayed":
        return delayed(DType.kFloat8E4M3, scale=8.0)
    if recipe == "current":
        return te.Float8CurrentScalingQuantizer(DType.kFloat8E4M3, torch.device("cpu"))
    if recipe == "blockwise":
        return te.Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=block_dimensions)
    if recipe == "mxfp8":
        return te.MXFP8Quantizer(DType.kFloat8E4M3)
    return te.NVFP4Quantizer(with_2d_quantization=block_dimensions == 2)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm_and_its_gradients(zero_centered: bool, platform) -> None:
    import transformer_engine_torch as tex

    x, weight, dz = values(10, 32).requires_grad_(), values(32).requires_grad_(), values(10, 32)
    expected = functional.rms_norm(x, (32,), weight + zero_centered, 1e-5)
    expected.backward(dz)
    out, mean, rsigma = tex.rmsnorm_fwd(x.detach(), weight.detach(), 1e-5, None, None, DType.kFloat32, 0, zero_centered)
    assert mean is None
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)
    dx, dweight = tex.rmsnorm_bwd(dz, x.detach(), rsigma, weight.detach(), 0, zero_centered)
    assert torch.allclose(dx, x.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(dweight, weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["sbhd_sbhd_sbhd", "bshd_bshd_bshd"])
@pytest.mark.parametrize("mask", ["causal", "no_mask"])
@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_attention_and_its_gradients(layout: str, mask: str, fp8: bool, platform) -> None:
    """Grouped queries: 4 heads over 2 key/value groups. In FP8 within a few of its last digits."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    sequence_first = layout.startswith("s")
    shape = (16, 3) if sequence_first else (3, 16)
    q, k, v, d_out = (torch.randn(*shape, heads, 16).requires_grad_() for heads in (4, 2, 2, 4))
    turned = [t.permute(1, 2, 0, 3) if sequence_first else t.permute(0, 2, 1, 3) for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*turned, is_causal=mask == "causal", enable_gqa=True)
    expected = expected.permute(2, 0, 1, 3) if sequence_first else expected.permute(0, 2, 1, 3)
    expected.backward(d_out.detach())
    backend = fused_attn.FusedAttnBackend["FP8" if fp8 else "F16_arbitrary_seqlen"]
    inputs = [t.detach() for t in (q, k, v)]
    quantizers = {}
    if fp8:
        e4m3 = DType.kFloat8E4M3
        inputs = [delayed(e4m3, 64.0)(t) for t in inputs]
        quantizers = {"s_quantizer": delayed(e4m3, 256.0), "o_quantizer": delayed(e4m3, 64.0)}
    common = dict(qkv_layout=layout, attn_mask_type=mask)
    lengths = torch.tensor([0, 16, 32, 48], dtype=torch.int32)
    out, aux = fused_attn.fused_attn_fwd(
        True, 16, 16, lengths, lengths, *inputs, torch.float32, backend, **common, **quantizers
    )
    d_out = d_out.detach()
    if fp8:
        del quantizers["o_quantizer"]
        quantizers |= {name: delayed(DType.kFloat8E5M2, 512.0) for name in ("dp_quantizer", "dqkv_quantizer")}
        d_out = delayed(DType.kFloat8E5M2, 64.0)(d_out)
    gradients = fused_attn.fused_attn_bwd(
        16, 16, lengths, lengths, *inputs, out, d_out, torch.float32, DType.kFloat32, aux, backend, **common, **quantizers
    )[:3]
    for found, exact in zip((out, *gradients), (expected, q.grad, k.grad, v.grad), strict=True):
        found = found.dequantize() if fp8 else found
        assert found.shape == exact.shape
        assert (found - exact).norm() < (0.15 if fp8 else 1e-5) * exact.norm()


def test_attention_refuses_what_it_does_not_compute(platform) -> None:
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    x, lengths = torch.randn(16, 1, 2, 8), torch.tensor([0, 16], dtype=torch.int32)
    backend = fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"]
    call = (True, 16, 16, lengths, lengths, x, x, x, torch.float32, backend)
    with pytest.raises(NotImplementedError, match="attention dropout"):
        fused_attn.fused_attn_fwd(*call, dropout=0.1, qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="causal")
    with pytest.raises(NotImplementedError, match="NVTE_PADDING_MASK"):
        fused_attn.fused_attn_fwd(*call, qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="padding")


def test_rotary_embeddings_and_their_gradient(platform) -> None:
    from transformer_engine.pytorch.attention.rope import _apply_rotary_pos_emb_base, apply_rotary_pos_emb

    x, angles = values(16, 2, 4, 8).requires_grad_(), torch.randn(20, 1, 1, 6)  # a part of the head stays as it is
    expected = _apply_rotary_pos_emb_base(x, angles, tensor_format="sbhd")
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    found = apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.allclose(gradient, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("adam_w", [True, False])
def test_fused_adam_is_torchs(adam_w: bool, platform) -> None:
    from transformer_engine.pytorch.optimizers import FusedAdam

    options = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    ours, theirs = values(8, 4).requires_grad_(), values(8, 4).requires_grad_()
    fused = FusedAdam([ours], adam_w_mode=adam_w, **options)
    plain = (torch.optim.AdamW if adam_w else torch.optim.Adam)([theirs], **options)
    for step in range(5):
        ours.grad = values(8, 4) * (step + 1)
        theirs.grad = ours.grad.clone()
        fused.step()
        plain.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_norms_and_scales_of_many_tensors(platform) -> None:
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale

    tensors = [values(3, 4), values(5)]
    whole, each = multi_tensor_applier(multi_tensor_l2norm, torch.zeros(1), [tensors], True)
    assert whole.item() == pytest.approx(math.hypot(*(t.norm().item() for t in tensors)))
    assert each.tolist() == pytest.approx([t.norm().item() for t in tensors])
    halves = [torch.empty_like(t) for t in tensors]
    multi_tensor_applier(multi_tensor_scale, torch.zeros(1), [tensors, halves], 0.5)
    assert all(torch.equal(half, t * 0.5) for half, t in zip(halves, tensors, strict=True))


def test_enumerations_have_the_headers_values() -> None:
    assert (dtypes.DType.kFloat32, dtypes.DType.kFloat8E4M3, dtypes.DType.kFloat4E2M1) == (4, 7, 10)
    assert (dtypes.NVTE_Fused_Attn_Backend.NVTE_No_Backend, dtypes.NVTE_Fused_Attn_Backend.NVTE_FP8) == (-1, 2)
    assert (dtypes.FP8FwdTensors.GEMM1_INPUT, dtypes.FP8FwdTensors.GEMM2_WEIGHT, dtypes.FP8BwdTensors.GRAD_OUTPUT1) == (0, 4, 0)
