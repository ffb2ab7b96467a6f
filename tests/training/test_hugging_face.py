"""An unmodified `transformers.Trainer` around models that run in shards; plain torch is the judge.

Everything is made here, from configurations: nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import torch_spheres as ts

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"

transformers = pytest.importorskip("transformers", reason="not there for every Python and torch")
from safetensors.torch import load_file  # noqa: E402

ROWS, LENGTH = 24, 6


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",  # or the first forward sets it
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2(use_cache=False):
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=use_cache,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Texts(Dataset):
    """As tokenizers give them, with a column that no model knows."""

    def __init__(self, model):
        words = torch.Generator().manual_seed(3)
        self.words = torch.randint(1, 50, (ROWS, LENGTH), generator=words)
        self.kind = torch.randint(0, 3, (ROWS,), generator=words)
        self.is_language_model = isinstance(model, transformers.GPT2LMHeadModel)

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        words = self.words[i]
        labels = words if self.is_language_model else self.kind[i]
        mask = torch.ones_like(words)
        return {"input_ids": words, "attention_mask": mask, "labels": labels, "source": i}


def trainer_of(model, folder, *, loss_kwargs=False, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=12, per_device_eval_batch_size=12,
        max_steps=3, learning_rate=0.01, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, label_names=["labels"],
        **options,
    )  # fmt: skip
    texts = Texts(getattr(model, "module", model))
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=texts, eval_dataset=texts
    )
    if not loss_kwargs:
        trainer.model_accepts_loss_kwargs = False
    return trainer


def losses_of(trainer):
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3 and steps[0] != steps[-1]
    return [*steps, trainer.evaluate()["eval_loss"]]


def made(build):
    torch.manual_seed(0)
    return build()


def agree(model, folder, **options):
    """Trains the model and a bare copy of it; returns the trainer of the first."""
    bare = copy.deepcopy(getattr(model, "module", model))
    if "forward" in vars(bare):
        bare.forward.remove()
    trainer, rows = trainer_of(model, folder, **options), []
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    embedding.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    found = losses_of(trainer)
    assert rows == [1] * 12 * (3 + 2)  # three steps, and two batches of the evaluation
    tolerance = 3e-2 if options.get("bf16") else 1e-4
    expected = losses_of(trainer_of(bare, folder, **options))
    assert found == pytest.approx(expected, rel=tolerance)
    if not options.get("bf16"):
        torch.testing.assert_close(model.state_dict(), bare.state_dict(), rtol=1e-3, atol=1e-4)
    return trainer


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_model_in_place_is_trained_evaluated_saved_and_loaded(spheres, tmp_path, build):
    model = ts.parallelize_(made(build), spheres)
    trainer = agree(model, tmp_path)
    trainer.save_model(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert type(loaded).__name__ in loaded.config.architectures
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    words = Texts(model).words
    torch.testing.assert_close(loaded.eval()(words).logits, model.eval()(words).logits)


def test_a_wrapped_model_is_trained_evaluated_saved_and_loaded(spheres, tmp_path):
    model = ts.SphereParallel(made(bert), spheres)
    trainer = agree(model, tmp_path)
    trainer.save_model(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    torch.testing.assert_close(weights, dict(model.state_dict()))
    model.save_pretrained(tmp_path / "pretrained")  # a method of the module
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "pretrained")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_the_columns_are_those_of_the_models_forward(spheres, tmp_path):
    for model in (ts.SphereParallel(made(bert), spheres), ts.parallelize_(made(bert), spheres)):
        loader = trainer_of(model, tmp_path).get_train_dataloader()
        assert next(iter(loader)).keys() == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("parallel", [ts.SphereParallel, ts.parallelize_])
def test_mixed_precision(spheres, tmp_path, parallel):
    agree(parallel(made(bert), spheres), tmp_path, bf16=True)


def test_checkpoints_are_resumed(spheres, tmp_path):
    model = ts.parallelize_(made(bert), spheres)
    once = trainer_of(model, tmp_path / "once")
    once.train()
    model = ts.parallelize_(made(bert), spheres)
    half = trainer_of(model, tmp_path / "half", save_steps=2)
    half.args.save_strategy = transformers.trainer_utils.IntervalStrategy.STEPS
    half.train()
    model = ts.parallelize_(made(bert), spheres)
    rest = trainer_of(model, tmp_path / "half")
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_generation_is_the_bare_models(spheres):
    bare = made(gpt2)
    prompts, options = Texts(bare).words[:12, :3], {"max_new_tokens": 4, "do_sample": False}
    mask = torch.ones_like(prompts)
    expected = bare.generate(prompts, attention_mask=mask, **options)
    parallel = ts.SphereParallel(copy.deepcopy(bare), spheres)
    assert torch.equal(parallel.generate(prompts, attention_mask=mask, **options), expected)
    ts.parallelize_(bare, spheres)
    assert torch.equal(bare.generate(prompts, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_loss_that_the_trainer_divides_by_the_batchs_own_count(spheres, tmp_path, build):
    agree(ts.parallelize_(made(build), spheres), tmp_path, loss_kwargs=True)


def test_the_cache_of_a_language_model_is_put_together(spheres):
    bare = made(lambda: gpt2(use_cache=True)).eval()
    words, caches = Texts(bare).words, []
    for model in (ts.SphereParallel(copy.deepcopy(bare), spheres), bare):
        cache = model(words).past_key_values
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
    torch.testing.assert_close(*caches)


def test_the_package_does_not_import_it():
    frameworks = "{'transformers', 'lightning', 'pytorch_lightning', 'accelerate'}"
    code = f"import sys, torch_spheres; print({frameworks} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("what", ["output_attentions", "output_hidden_states"])
def test_hooks_that_a_forward_installs_to_catch_outputs(spheres, what):
    """The model puts them on its layers in the first such forward, and counts on having them."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    bare = made(lambda: transformers.BertModel(config)).eval()
    words, model = Texts(bare).words, ts.SphereParallel(copy.deepcopy(bare), spheres)
    expected = bare(words, **{what: True}).to_tuple()[-1]
    with pytest.warns(UserWarning, match=r"changes attributes of the module.*_forward_hooks"):
        first = model(words, **{what: True})
    second = model(words, **{what: True})
    for found in (first, second, model.module(words, **{what: True})):
        torch.testing.assert_close(found.to_tuple()[-1], expected)
    assert len(model(words).to_tuple()) == 2
