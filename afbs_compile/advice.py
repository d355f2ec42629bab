"""What can a user do about an attention call that stays dense? One next step for every reason."""

import re

STEPS: tuple[tuple[str, str], ...] = (
    (r"AFBS_DISABLE", "unset AFBS_DISABLE"),
    (r"max_error is 0", "set max_error above 0"),
    (r"no real inputs", "export leaves attention dense; use torch.compile(backend='afbs')"),
    (r"known only at run time", "pass sizes, masks and is_causal that do not depend on data"),
    (r"inside vmap", "call the model on a batch instead of under vmap"),
    (r"inside selective", "checkpoint whole layers: leave context_fn out"),
    (r"inside autocast", "load the model in the dtype itself (model.to(torch.bfloat16))"),
    (r"inside sdpa_kernel", "remove the sdpa_kernel context: it asks for a dense kernel"),
    (r"inside ", "move the attention out of the context"),
    (r"dropout", "model.eval(), or set attention dropout to 0"),
    (r"not recorded|called? with no", "run with TORCH_LOGS=graph_code and report the graph"),
    (r"-D tensors", "reshape q, k and v to [batch, heads, tokens, head dim]"),
    (r"symbolic head", "mark only batch and length dynamic, not heads or head dim"),
    (r"value head dim", "no kernel takes it; the call stays SDPA"),
    (r"query heads on|differ in batch", "give k and v the heads, batch and length that q needs, "
                                        "and enable_gqa=True for grouped heads"),
    (r"differ in dtype", "cast q, k and v to one dtype and device"),
    (r"no kernel for device", "move the model to a GPU or a CPU"),
    (r"no kernel for dtype", "use float32, float16 or bfloat16"),
    (r"head dim \d+ is outside", "no kernel takes it; the call stays SDPA"),
    (r"needs gradients.*backward with", "train with compensation='none'"),
    (r"needs gradients.*added to the scores", "freeze the mask (requires_grad_(False)), or run "
                                              "under torch.no_grad()"),
    (r"depend on data with compensation", "set compensation='none'"),
    (r"needs gradients", "run under torch.no_grad(), or train on a GPU"),
    (r"^short", "set min_length lower if it should be sparse all the same"),
    (r"log-sum-exps|causal fused", "call scaled_dot_product_attention instead"),
    (r"attention weights are read", "pass need_weights=False to nn.MultiheadAttention"),
    (r"fast path of nn.Multi", "torch.backends.mha.set_fastpath_enabled(False)"),
    (r"cannot be laid open|positional need_weights", "call the module as torch documents it"),
    (r"attention weights have other", "do not ask for attention weights (output_attentions)"),
    (r"scores (have|pass|are)|a mask is scaled|a number is added|hidden scores|masks are added",
     "use the model's SDPA (attn_implementation='sdpa'), or compute softmax(mask(c*q@k))@v only"),
    (r"einsum|broadcast over (the batch|heads)|the result has another|-D factors",
     "call torch.nn.functional.scaled_dot_product_attention instead"),
    (r"rows that see nothing", "let every query see a key, or call SDPA with a boolean mask"),
    (r"attn_mask and is_causal", "pass one of them"),
    (r"no attn_mask", "pass is_causal=True for a causal mask; others stay SDPA"),
    (r"float mask", "pass a boolean mask, or is_causal=True"),
    (r"mask depends on an input|mask depends on a stored|padding",
     "leave attention_mask out where nothing is padded, or sort prompts by length"),
    (r"mask", "pass is_causal=True or a causal, sliding-window or no mask"),
    (r"not faster", "nothing: longer inputs may gain"),
    (r"no head is sparse", "raise max_error, if you can afford it"),
    (r"tuning budget|tuning was interrupted", "run again: tuning goes on where it stopped"),
    (r"not tuned yet", "call again: the next call of this length tunes; or afbs_compile.tune()"),
    (r"no tuning for|not in the policy|policy is for|dense in the policy",
     "tune at this length: afbs_compile.tune(model, inputs)"),
    (r"policy file", "make a policy of these weights with `afbs tune`, or leave `policy` out"),
    (r"calibration failed", "try another input; see the warning"),
    (r"forward-mode|nested|compiled by another", "use torch.compile(backend='afbs')"),
    (r"no site of this name|attention module", "run the model itself, not a part of it"),
)  # fmt: skip
UNKNOWN = "set AFBS_LOG=+passes to see the call, and report it"


def next_step(reason: str | None) -> str:
    """What to do about a reason; empty for none."""
    if not reason:
        return ""
    return next((step for pattern, step in STEPS if re.search(pattern, reason)), UNKNOWN)
