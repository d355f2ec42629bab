"""Policies for the tests of this folder, made from a document that schema 1 must always read."""

from dataclasses import replace
from pathlib import Path

import pytest

from afbs_compile.policy import Policy, bucket_of

DOCUMENT = Path(__file__).with_name("policy_v1.json")


def tuning(length=4096, max_error=0.2, tau=0.9, **changes):
    """The document's tuning: a sparse site of two heads that keep `tau`, and a dense site."""
    (stored,) = Policy.read(DOCUMENT).tunings
    options = stored.options | {"max_error": max_error}
    site = stored.sites["layers.0.attn"]
    kept = replace(site, heads=tuple(replace(head, tau=tau) for head in site.heads))
    where = {"bucket": bucket_of(length), "length": length, "options": options}
    return replace(stored, **({"sites": stored.sites | {site.name: kept}} | where | changes))


def policy(*tunings, key="ab" * 16):
    """A policy of `tunings`, or of the document's."""
    return replace(Policy.read(DOCUMENT), model=key, tunings=tunings or (tuning(),))


@pytest.fixture(name="tuning")
def tuning_factory():
    return tuning


@pytest.fixture(name="policy")
def policy_factory():
    return policy


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a two-layer Llama with random weights, whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
