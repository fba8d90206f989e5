"""Losses over the vocabulary, chunk by chunk, against autograd over whole logits."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from dipper import head_losses  # noqa: E402
from dipper.head_losses import cross_entropy, divergence  # noqa: E402

N, D, V = 70, 12, 50


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr(head_losses, "_LOGITS_AT_ONCE", 32 * V)  # of 32, 32 and 6 rows


@pytest.fixture(params=["linear", "capped", "bf16"])
def head(request):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    linear = torch.nn.Linear(D, V, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight.mul_(6)
    return (lambda x: 3 * torch.tanh(linear(x) / 3)) if request.param == "capped" else linear


def rows(head, seed):
    dtype = getattr(getattr(head, "weight", None), "dtype", torch.float32)
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(seed == 1)


def both(head, loss_of, whole_of):
    """Losses and gradients by the rows, chunked and whole; the loss is scaled on its way, as in a step."""
    found = []
    for of in (loss_of, whole_of):
        student = rows(head, 1)
        loss = of(student)
        (0.25 * loss).backward()
        found.append((loss.detach(), student.grad.float()))
    return found


def check(head, found):
    (loss, grad), (whole, expected) = found
    tolerance = 2e-2 if isinstance(head, torch.nn.Linear) and head.weight.dtype == torch.bfloat16 else 1e-5
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(whole), rel=tolerance)
    assert float(expected.norm()) > 0.1
    assert float((grad - expected).norm()) < tolerance * float(expected.norm())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(head, temperature):
    teacher = rows(head, 2)

    def whole(student):
        q, p = (torch.log_softmax(head(x).float() / temperature, -1) for x in (student, teacher))
        return functional.kl_div(q, p, log_target=True, reduction="sum")

    check(head, both(head, lambda student: divergence(head, student, teacher, temperature=temperature), whole))


def test_cross_entropy(head):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    found = both(
        head,
        lambda student: cross_entropy(head, student, targets),
        lambda student: functional.cross_entropy(head(student).float(), targets, reduction="sum"),
    )
    check(head, found)


def test_of_itself_there_is_none(head):
    student = rows(head, 1)
    loss = divergence(head, student, student.detach())
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(student.grad.float().norm()) == 0


def test_without_a_gradient_none_is_made(head, monkeypatch):
    student, teacher = rows(head, 1), rows(head, 2)
    expected = float(divergence(head, student, teacher).detach())
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        assert float(divergence(head, student, teacher)) == expected
    assert not divergence(head, student.detach(), teacher).requires_grad


def test_nan_is_seen(head):
    student = rows(head, 1).detach()
    student[40] = float("nan")
    assert torch.isnan(divergence(head, student, rows(head, 2)))
