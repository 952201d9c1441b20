"""Models quantized while they are loaded: the same as quantized afterwards, and the engine runs them."""

import pytest
import torch

import herdling
from herdling.quant.modules import Matrix, QuantExperts
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap


@pytest.fixture(scope="module")
def folder(make_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model"
    herdling.save(make_lm(interleave_moe_layer_step=2), path)
    return path


@pytest.mark.parametrize("name", ["w4a8", "int8", "mxfp4", "meta-fp8"])
def test_loading_quantized_is_loading_then_quantizing(folder, name):
    lm, plain = herdling.load(folder, quantize=name), herdling.load(folder)
    report = swap(plain.model, scheme(name))
    assert report.share > 0.1
    ids = [plain.tokenizer.encode("the quick brown fox jumps")]
    assert torch.equal(lm.logits(ids), plain.logits(ids))
    matrices = [m for m in lm.model.modules() if isinstance(m, Matrix)]
    assert len(matrices) == len([m for m in plain.model.modules() if isinstance(m, Matrix)]) > 1
    half = herdling.load(folder, quantize=name, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    for narrow, wide in zip(half.model.modules(), lm.model.modules(), strict=True):
        if isinstance(narrow, Matrix) and isinstance(wide, Matrix):
            assert torch.equal(narrow.scales, wide.scales.to(narrow.scales.dtype))
            if narrow.scales.dtype == wide.scales.dtype:
                assert torch.equal(narrow.stored(), wide.stored())
                assert torch.equal(narrow.dense(), wide.dense().bfloat16())
            else:  # a row's scale is kept in the model's type, and codes are made for it
                torch.testing.assert_close(
                    narrow.dense().float(), wide.dense(), rtol=0.13, atol=0.01
                )
    assert half.logits(ids).isfinite().all()


@pytest.mark.parametrize("name", ["w4a8", "w8a8", "int4", "fp8"])
def test_the_engine_says_what_the_plain_forward_does(folder, name):
    lm = herdling.load(folder, quantize=name)
    assert any(isinstance(m, QuantExperts) for m in lm.model.modules())
    prompts = ["the quick", "numbers 1 2 3 and", "dog"]
    for prompt, reply in zip(prompts, lm.generate(prompts, max_tokens=9, stop_ids=()), strict=True):
        ids = [lm.tokenizer.bos, *lm.tokenizer.encode(prompt)]
        for token in reply.ids:
            logits = lm.logits([ids])[0, -1]
            # Sums of the two are in another order; of tokens this close either may be first.
            assert logits[token] >= logits.max() - 1e-3
            ids.append(token)


def test_the_engine_sees_codes_that_were_changed(folder):
    """Also where a plain forward has put them into the kernels' layout again in the meantime."""
    lm, other = (herdling.load(folder, quantize="w4a8") for _ in range(2))
    with torch.no_grad():
        for matrix in (m for m in other.model.modules() if isinstance(m, Matrix)):
            matrix.scales.mul_(torch.where(torch.rand_like(matrix.scales) < 0.5, 0.5, 2.0))
    wanted = other.generate(["the quick"], max_tokens=6, stop_ids=(), top_logprobs=1)[0]
    before = lm.generate(["the quick"], max_tokens=6, stop_ids=(), top_logprobs=1)[0]
    assert before.logprobs != wanted.logprobs
    lm.model.load_state_dict(other.model.state_dict())
    ids = [lm.tokenizer.encode("the quick")]
    assert torch.equal(lm.logits(ids), other.logits(ids))
    after = lm.generate(["the quick brown"], max_tokens=6, stop_ids=(), top_logprobs=1)[0]
    again = other.generate(["the quick brown"], max_tokens=6, stop_ids=(), top_logprobs=1)[0]
    assert (after.ids, after.logprobs) == (again.ids, again.logprobs)
