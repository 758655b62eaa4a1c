"""Prompts of different length, masked prompts, regional prompts and picture sizes reach the network as they should."""

import torch

from .drive import counted, noise, predict, prompt, sample


def test_unequal_prompts_take_one_call_per_step_under_guidance(comfy, sigma):
    model, calls = counted(sigma)
    sample(comfy, model, prompt(40, 1), prompt(3, 2), steps=4)
    assert [batch for batch, _ in calls] == [2] * 4


def test_unequal_prompts_in_one_batch_give_what_two_batches_give(sigma):
    positive, negative, x = prompt(40, 1), prompt(3, 2), noise()
    model, calls = counted(sigma)
    together = predict(model, [positive, negative], x)
    apart = [predict(model, [cond], x)[0] for cond in (positive, negative)]
    assert len(calls) == 3
    for one, other in zip(together, apart, strict=True):
        assert (one - other).abs().max() < 1e-5


def test_prompts_of_one_length_need_no_mask(sigma):
    model, calls = counted(sigma)
    predict(model, [prompt(5, 1), prompt(5, 2)], noise())
    assert [mask for _, mask in calls] == [None]


def test_tokens_outside_the_attention_mask_do_not_count(sigma):
    caption = prompt(20, 1)[0][0]
    mask = torch.zeros(1, 20, dtype=torch.int64)
    mask[:, :6] = 1
    (masked,) = predict(sigma, [[[caption, {"attention_mask": mask}]]], noise())
    (short,) = predict(sigma, [[[caption[:, :6], {}]]], noise())
    assert (masked - short).abs().max() < 1e-5


def test_a_mask_with_holes_is_honoured(sigma):
    caption, mask = prompt(4, 1)[0][0], torch.tensor([[1, 0, 1, 1]])
    (masked,) = predict(sigma, [[[caption, {"attention_mask": mask}]]], noise())
    (short,) = predict(sigma, [[[caption[:, [0, 2, 3]], {}]]], noise())
    assert (masked - short).abs().max() < 1e-5


def test_text_behind_the_end_of_the_mask_counts(sigma):
    """ConditioningConcat lengthens the tokens and leaves the mask as it is."""
    caption, mask = prompt(9, 1, batch=2)[0][0], torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    (out,) = predict(sigma, [[[caption, {"attention_mask": mask}]]], noise(batch=2))
    for i, kept in enumerate(([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 6, 7, 8])):
        (alone,) = predict(sigma, [[[caption[i : i + 1, kept], {}]]], noise(batch=2)[i : i + 1])
        assert (out[i] - alone[0]).abs().max() < 1e-5


def test_each_picture_of_a_batch_follows_its_own_prompt(sigma):
    caption = prompt(9, 1, batch=3)[0][0]
    mask = (torch.arange(9) < torch.tensor([[2], [9], [5]])).long()
    x = noise(batch=3)
    (batch,) = predict(sigma, [[[caption, {"attention_mask": mask}]]], x)
    for i, length in enumerate((2, 9, 5)):
        (alone,) = predict(sigma, [[[caption[i : i + 1, :length], {}]]], x[i : i + 1])
        assert (batch[i] - alone[0]).abs().max() < 1e-5


def test_a_prompt_for_fewer_pictures_than_the_batch_is_repeated(sigma):
    caption, mask = prompt(6, 1, batch=2)[0][0], torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    x = noise().expand(4, -1, -1, -1)
    (batch,) = predict(sigma, [[[caption, {"attention_mask": mask}]]], x)
    assert (batch[0] - batch[2]).abs().max() < 1e-5 and (batch[1] - batch[3]).abs().max() < 1e-5
    assert (batch[0] - batch[1]).abs().max() > 1e-2


def test_an_empty_or_wholly_masked_prompt_is_no_accident(sigma):
    caption = prompt(5, 1)[0][0]
    (everything,) = predict(sigma, [[[caption, {}]]], noise())
    (nothing,) = predict(sigma, [[[caption, {"attention_mask": torch.zeros(1, 5)}]]], noise())
    assert torch.equal(everything, nothing)
    (empty,) = predict(sigma, [prompt(0, 1)], noise())
    (zero,) = predict(sigma, [[[torch.zeros(1, 1, 32), {}]]], noise())
    assert torch.equal(empty, zero)


def test_regional_prompts_of_different_length_fill_their_own_halves(sigma):
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :8], right[..., 8:] = 1, 1
    a, b = prompt(5, 1), prompt(12, 2)
    both = [[a[0][0], {"mask": left}], [b[0][0], {"mask": right}]]
    model, calls = counted(sigma)
    (out,) = predict(model, [both], noise())
    assert len(calls) == 1
    assert (out[..., :8] - predict(sigma, [a], noise())[0][..., :8]).abs().max() < 1e-4
    assert (out[..., 8:] - predict(sigma, [b], noise())[0][..., 8:]).abs().max() < 1e-4


def test_area_prompts_run_on_their_part_of_the_latent(comfy, sigma):
    area = [[prompt(5, 1)[0][0], {"area": (8, 8, 4, 8)}]] + prompt(3, 4)
    assert sample(comfy, sigma, area).shape == (1, 4, 16, 16)


# Micro-conditioning


def micro(model, x, **extra):
    return predict(model, [prompt(5, 1, **extra)], x)[0]


def test_micro_conditioned_models_default_to_the_size_of_the_latent(load_model):
    model, x = load_model("alpha_ms.safetensors"), noise(height=16, width=32)
    default = micro(model, x)
    assert torch.equal(default, micro(model, x, width=256, height=128, aspect_ratio=0.5))
    assert (default - micro(model, x, width=1024, height=1024)).abs().max() > 1e-4
    assert (default - micro(model, x, aspect_ratio=2.0)).abs().max() > 1e-4


def test_other_models_ignore_the_picture_size(sigma):
    assert torch.equal(micro(sigma, noise()), micro(sigma, noise(), width=1024, height=512))
