"""The decoder of a model that writes text, with its cache as flat tensors and masks made inside."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmopt.capture.patches import n_deep
from vlmopt.capture.prefix import is_prefixed, prefixed_step
from vlmopt.capture.samples import text_config
from vlmopt.capture.wrappers import Wrapper
from vlmopt.core.errors import CaptureError


def reads_types(model: nn.Module) -> bool:
    """Types of tokens decide which of them see what comes behind them."""
    return is_prefixed(model) or "token_type_ids" in inspect.signature(model.forward).parameters


class Decoder(Wrapper):
    """`inputs_embeds` [B, S, D], `attention_mask` [B, P + S], `position_ids` [B, S] and for every layer its past keys
    and values [B, H, P, K] -> `logits` [B, S, V] and the keys and values [B, H, P + S, K] for the next step.

    A model that reads types of tokens has them, `token_type_ids` [B, S], behind the positions; one that places images
    in a plane has `position_ids` [3, B, S]. A cache keeps all keys: layers with a window hide those outside of it.
    """

    def __init__(self, model: nn.Module, n_layers: int) -> None:
        super().__init__(model)
        sides = [(layer, side) for layer in range(n_layers) for side in ("key", "value")]
        self.past = tuple(f"past_key_values_{layer}_{side}" for layer, side in sides)
        own = ("inputs_embeds", "attention_mask", "position_ids")
        types = ("token_type_ids",) if reads_types(model) else ()
        self.n_deep = n_deep(model)
        self._one_way = one_way_type(model) if types and not is_prefixed(model) else 0
        self.inputs = (*own, *types, *self.past)
        self.outputs = ("logits", *(f"present_{layer}_{side}" for layer, side in sides))

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: values[name] for name in self.inputs if name not in self.past}
        return own | {"past": tuple(values[name] for name in self.past)}

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        past: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        if is_prefixed(self.model):
            assert token_type_ids is not None
            logits = prefixed_step(self.model, inputs_embeds, attention_mask, position_ids, token_type_ids, cache)
            return (logits, *_present(cache))
        mask: Any = attention_mask
        if token_type_ids is not None:
            mask = self._typed_mask(inputs_embeds, attention_mask, token_type_ids, cache)
        first, *deep = inputs_embeds.chunk(1 + self.n_deep, -1) if self.n_deep else (inputs_embeds,)
        found = self.model.get_decoder()(
            inputs_embeds=first,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **self._added(deep),
        )
        present = _present(cache)
        if "logits" in found:  # a language model with its own last layer
            return (found.logits, *present)
        logits = self.model.get_output_embeddings()(found.last_hidden_state)
        cap = getattr(text_config(self.model.config), "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return (logits, *present)

    @staticmethod
    def _added(deep: list[Tensor]) -> dict[str, Any]:
        """Features of images for the early layers, as the decoder takes them: rows of all tokens, for all are meant."""
        if not deep:
            return {}
        everywhere = torch.ones(deep[0].shape[:2], dtype=torch.bool, device=deep[0].device)
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [each.flatten(0, 1) for each in deep]}

    def _typed_mask(self, embeds: Tensor, mask: Tensor, types: Tensor, cache: DynamicCache) -> Any:
        """The masks that the model makes at the start of an answer; what is past is seen whatever its type."""
        past = types.new_full((types.shape[0], mask.shape[1] - types.shape[1]), self._one_way)
        return self.model.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=None,
            token_type_ids=torch.cat([past, types], 1),
            is_first_iteration=True,
        )


def _present(cache: DynamicCache) -> list[Tensor]:
    return [value for layer in cache.layers for value in (layer.keys, layer.values)]


def one_way_type(model: Any) -> int:
    """The type of tokens that see only what came before them, 0 or 1; tokens of the other see each other.

    Raises:
        CaptureError: there is no such type, both are, or the model does not say.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if not hasattr(model, "create_masks_for_generate"):
        raise CaptureError(
            type(model).__name__,
            "reads types of tokens (token_type_ids) and does not say what each of them sees",
            expected="a method create_masks_for_generate",
        )
    with unset_fake_temporarily():
        found = [kind for kind in (0, 1) if not _sees_ahead(model, kind)]
    if len(found) != 1:
        raise CaptureError(
            type(model).__name__,
            f"{len(found)} of the types of tokens 0 and 1 see only what came before them",
            expected="one type for text that is written and one for what is given",
        )
    return found[0]


def _sees_ahead(model: Any, kind: int) -> bool:
    masks = model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.zeros(1, 2, 1),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        past_key_values=None,
        position_ids=None,
        token_type_ids=torch.full((1, 2), kind),
        is_first_iteration=True,
    )
    (mask, *_) = masks.values() if isinstance(masks, dict) else (masks,)
    if mask is None:  # the attention itself is told to look back only
        return False
    return bool(mask[0, 0, 0, 1] if mask.dtype is torch.bool else mask[0, 0, 0, 1] == 0)
