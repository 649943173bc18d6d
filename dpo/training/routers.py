"""The load-balancing loss of mixtures of experts, which keeps the experts equally used."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dpo.common.errors import InputError
from dpo.engine.logprobs import LogProbModel


def check_routers(config: Any) -> None:
    """Check that a model, by its transformers config, returns the logits of its routers.

    Raises:
        InputError: it does not.
    """
    if not (hasattr(config, "output_router_logits") and hasattr(config, "num_experts_per_tok")):
        raise InputError(
            f"params.yaml: router_aux_loss: a model of type '{config.model_type}' has no experts, or returns no "
            "logits of its routers; set it to 0"
        )


def load_balancing_loss(logits: Sequence[Tensor], active: int) -> Tensor:
    """Return E sum_i f_i P_i over E experts (Fedus et al. 2021, "Switch Transformers", eq. 4-6).

    f_i is the number of tokens that choose expert i divided by the number of tokens, P_i the mean probability of
    expert i. The tokens of all layers count together, as in transformers. If all experts are equally used, the
    loss is `active`.

    Args:
        logits: of the routers, one tensor [tokens, E] per layer.
        active: number of experts that a token chooses.
    """
    probabilities = torch.cat(list(logits)).float().softmax(1)
    tokens, experts = probabilities.shape
    chosen = probabilities.detach().topk(active).indices.flatten()
    counts = torch.zeros(experts, device=chosen.device).index_add_(0, chosen, torch.ones_like(chosen).float())
    return experts * (counts / tokens * probabilities.mean(0)).sum()


class RouterLoss:
    """Computes the load-balancing loss of each pass with gradients of a model, inside a `with` block.

    It counts the tokens of the packed stream, so that the prompt of a pair counts once.

    Attributes:
        value: the loss of the last pass.

    Raises:
        InputError: the model has no routers, its layers are compiled, or it is computed row by row.
    """

    def __init__(self, model: LogProbModel) -> None:
        check_routers(model.model.config)
        if model.compiled:
            raise InputError("params.yaml: router_aux_loss does not work with engine.compile; set it to false")
        if not model.in_stream:
            name = type(model.model).__name__
            raise InputError(
                f"params.yaml: router_aux_loss is not supported for {name}, which the packed stream cannot "
                "compute; set it to 0"
            )
        # transformers would not return the logits of a sharded model, whose class has another name.
        known = model.model._can_record_outputs["router_logits"]
        self.places = {each.target_class: each.index for each in (known if isinstance(known, list) else [known])}
        self.decoder, self.active = model.model.get_decoder(), model.model.config.num_experts_per_tok
        self.routers = [module for module in self.decoder.modules() if type(module) in self.places]
        self.logits: list[Tensor] | None = None
        self.value = torch.zeros(())

    def __enter__(self) -> None:
        """Start."""
        routers = [router.register_forward_hook(self._collect) for router in self.routers]
        before = self.decoder.register_forward_pre_hook(self._start)
        self.hooks = [before, *routers, self.decoder.register_forward_hook(self._finish)]

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        """Stop."""
        for hook in self.hooks:
            hook.remove()

    def _start(self, *_: Any) -> None:
        self.logits = [] if torch.is_grad_enabled() else None

    def _collect(self, router: nn.Module, inputs: Any, output: Any) -> None:
        if self.logits is not None:  # the backward pass recomputes a layer outside of the decoder's pass
            self.logits.append(output[self.places[type(router)]])

    def _finish(self, *_: Any) -> None:
        if self.logits is not None:
            self.value, self.logits = load_balancing_loss(self.logits, self.active), None
