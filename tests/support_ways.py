"""The ways in which people train, each a function that trains a net some steps and returns its losses."""

import io
from collections.abc import Callable
from functools import partial

import torch
from support_training import STEPS, images, loss_of, sgd, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Way = Callable[[nn.Module], list[Tensor]]


def mixed_precision(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    x, labels = images()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, x, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return losses


def channels_last(model: nn.Module) -> list[Tensor]:
    losses = train(model.to(memory_format=torch.channels_last))
    kernel = next(p for name, p in model.named_parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    return losses


def checkpointed(model: nn.Module, reentrant: bool) -> list[Tensor]:
    x, labels = images()
    x.requires_grad_()
    optimizer = sgd(model.parameters())
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def accumulated(model: nn.Module) -> list[Tensor]:
    x, labels = images()
    optimizer = sgd(model.parameters())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        parts = [loss_of(model, *part) / 4 for part in zip(x.chunk(4), labels.chunk(4), strict=True)]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(torch.stack(parts).sum().detach())
    return losses


def clipped(model: nn.Module) -> list[Tensor]:
    x, labels = images()
    optimizer = sgd(model.parameters())
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, x, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def compiled(model: nn.Module, backend: str) -> list[Tensor]:
    """`fullgraph` raises at a graph break."""
    torch.compiler.reset()
    return train(torch.compile(model, fullgraph=True, backend=backend))


def compiled_in_place(model: nn.Module) -> list[Tensor]:
    torch.compiler.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    return train(model)


def adamw(model: nn.Module, **options: bool) -> list[Tensor]:
    return train(model, torch.optim.AdamW(model.parameters(), lr=0.02, **options))


def lbfgs(model: nn.Module) -> list[Tensor]:
    x, labels = images()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, labels)
        loss.backward()
        return loss

    for _ in range(4):
        losses.append(optimizer.step(closure).detach())
    return losses


def vector_descent(model: nn.Module) -> list[Tensor]:
    """Gradient descent on `parameters_to_vector`."""
    x, labels = images()
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, x, labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        step = nn.utils.parameters_to_vector([gradient.contiguous() for gradient in gradients])
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) - 0.3 * step, model.parameters()
        )
        losses.append(loss.detach())
    return losses


def functional_call(model: nn.Module) -> list[Tensor]:
    """Parameters outside the module, gradients by torch.func; brought back at the end."""
    model.norm.eval()  # type: ignore[union-attr] - torch.func forbids the running statistics' updates
    x, labels = images()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_at(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), labels)

    losses = []
    for _ in range(STEPS):
        gradients, loss = torch.func.grad_and_value(loss_at)(parameters)
        parameters = {name: p - 0.3 * gradients[name] for name, p in parameters.items()}
        losses.append(loss.detach())
    model.load_state_dict(parameters, strict=False)
    return losses


def unfrozen(model: nn.Module) -> list[Tensor]:
    """The head alone first; then everything."""
    optimizer = sgd(model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    losses = train(model, optimizer, 2)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"head.weight", "head.bias"}
    model.requires_grad_(True)
    return losses + train(model, optimizer)


def synchronized(model: nn.Module) -> list[Tensor]:
    model.norm = nn.SyncBatchNorm.convert_sync_batchnorm(model.norm)  # type: ignore[assignment, arg-type]
    whole = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert whole is model
    assert isinstance(model.norm, nn.SyncBatchNorm)
    return train(model)


def resumed(model: nn.Module) -> list[Tensor]:
    """Half the way, the model and the optimizer through state dicts, and on."""
    optimizer = sgd(model.parameters())
    first = train(model, optimizer, STEPS // 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    model.load_state_dict(saved["model"])
    again = sgd(model.parameters())
    again.load_state_dict(saved["optimizer"])
    return first + train(model, again, STEPS // 2)


WAYS: dict[str, Way] = {
    "SGD": train,
    "AdamW foreach": partial(adamw, foreach=True),
    "AdamW fused": partial(adamw, fused=True),
    "L-BFGS": lbfgs,
    "parameters_to_vector": vector_descent,
    "AMP bf16": partial(mixed_precision, dtype=torch.bfloat16),
    "AMP fp16, GradScaler": partial(mixed_precision, dtype=torch.float16),
    "channels_last": channels_last,
    "checkpointing, reentrant": partial(checkpointed, reentrant=True),
    "checkpointing, non-reentrant": partial(checkpointed, reentrant=False),
    "gradient accumulation": accumulated,
    "gradient clipping": clipped,
    "torch.compile": partial(compiled, backend="aot_eager"),
    "Module.compile": compiled_in_place,
    "functional_call": functional_call,
    "freezing, unfreezing": unfrozen,
    "SyncBatchNorm": synchronized,
    "resumed": resumed,
}
