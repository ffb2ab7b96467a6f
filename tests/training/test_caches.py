"""Hugging Face's outputs and key-value caches, on tiny models with random weights."""

from __future__ import annotations

import copy

import pytest
import torch

import torch_spheres as ts

transformers = pytest.importorskip("transformers")

# (Which name the argument has depends on the release.)
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
IDS = torch.randint(0, 50, (26, 6), generator=torch.Generator().manual_seed(0))


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def layers_of(cache):
    """Keys and values, of whichever release of transformers."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


@pytest.mark.parametrize("rows", [26, 24, 5])
def test_caches_are_put_together_and_cut(spheres, rows):
    plain = gpt2().eval()
    model = ts.SphereParallel(copy.deepcopy(plain), spheres)
    with torch.no_grad():
        ours, theirs = model(IDS[:rows], use_cache=True), plain(IDS[:rows], use_cache=True)
        for _ in range(2):
            assert type(ours.past_key_values) is type(theirs.past_key_values)
            assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
            pairs = zip(
                layers_of(ours.past_key_values), layers_of(theirs.past_key_values), strict=True
            )
            for found, expected in pairs:
                torch.testing.assert_close(found, expected)
            torch.testing.assert_close(ours.logits, theirs.logits)
            words = theirs.logits[:, -1:].argmax(-1)
            ours, theirs = (
                net(words, past_key_values=out.past_key_values, use_cache=True)
                for net, out in ((model, ours), (plain, theirs))
            )


def test_training_returns_them_too(spheres):
    plain = gpt2()
    model = ts.SphereParallel(copy.deepcopy(plain), spheres)
    ours, theirs = model(IDS, labels=IDS), plain(IDS, labels=IDS)
    torch.testing.assert_close(ours.loss, theirs.loss)
    for found, expected in zip(
        layers_of(ours.past_key_values), layers_of(theirs.past_key_values), strict=True
    ):
        torch.testing.assert_close(found, expected)
    ours.loss.backward()
    theirs.loss.backward()
    for a, b in zip(model.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_divided_by_the_batchs_count_is_summed(spheres):
    plain = gpt2(tie_word_embeddings=True)
    model = ts.SphereParallel(copy.deepcopy(plain), spheres)
    count = (IDS[:, 1:] != -100).sum()
    kwargs = {"labels": IDS, "num_items_in_batch": count, "use_cache": False}
    ours, theirs = model(IDS, **kwargs), plain(IDS, **kwargs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for a, b in zip(model.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_padded_labels_are_told_of(spheres):
    """A mean over tokens is no mean over rows."""
    labels = IDS.clone()
    labels[1:6, 2:] = -100
    labels[3, 1:4] = -100
    model = ts.SphereParallel(gpt2(), spheres)
    with pytest.warns(UserWarning, match=r"neither the mean nor the sum .*tokens that are not pad"):
        model(IDS, labels=labels, use_cache=False)


@pytest.mark.parametrize("kind", ["static", "encoder-decoder"])
def test_other_caches(spheres, kind):
    model = ts.SphereParallel(gpt2().eval(), spheres)
    with torch.no_grad():
        if kind == "static":
            cache = transformers.StaticCache(config=model.module.config, max_cache_len=16)
            model.module(IDS, past_key_values=cache, use_cache=True)
            theirs = copy.deepcopy(cache)
            found = model(IDS[:, :1], past_key_values=cache, use_cache=True)
            expected = model.module(IDS[:, :1], past_key_values=theirs, use_cache=True)
            torch.testing.assert_close(found.logits, expected.logits)
            for a, b in zip(
                layers_of(found.past_key_values), layers_of(expected.past_key_values), strict=True
            ):
                torch.testing.assert_close(a, b)
            assert found.past_key_values.get_seq_length() == 7
            return
        config = transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        plain = transformers.T5ForConditionalGeneration(config).eval()
        found = ts.SphereParallel(plain, spheres)(input_ids=IDS, decoder_input_ids=IDS)
        expected = plain(input_ids=IDS, decoder_input_ids=IDS)
        torch.testing.assert_close(found.logits, expected.logits)
        ours, theirs = found.past_key_values, expected.past_key_values
        assert type(ours) is type(theirs)
        for part in ("self_attention_cache", "cross_attention_cache"):
            for a, b in zip(
                layers_of(getattr(ours, part)), layers_of(getattr(theirs, part)), strict=True
            ):
                torch.testing.assert_close(a, b)
        assert ours.is_updated == theirs.is_updated


def test_a_model_output_of_bert(spheres):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=6,
    )  # fmt: skip
    plain = transformers.BertForSequenceClassification(config)
    model = ts.SphereParallel(copy.deepcopy(plain), spheres)
    kwargs = {"attention_mask": torch.ones_like(IDS), "labels": IDS[:, 0] % 6}
    ours, theirs = model(IDS, **kwargs), plain(IDS, **kwargs)
    assert list(ours) == list(theirs) == ["loss", "logits"]
    torch.testing.assert_close(ours.to_tuple(), theirs.to_tuple())
