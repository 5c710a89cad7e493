"""GELU: every order of its factors and form of its polynomial becomes one op; other constants stay."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmdit_deploy.graph.fuse.gelu import gelu

SUBJECT = "gelu"
# The spelling rounds each step to fp16; where 1 + erf is small, that is far above the last place of the result.
HALF = {"rtol": 4 * 2**-10, "atol": 2 * 2**-10}
ROOT, SLOPE = math.sqrt(2), math.sqrt(2 / math.pi)


def graph(body: str, dtype: type[np.generic] = np.float32, **more: float) -> str:
    """A graph with the constants that its nodes name, as a type holds them."""
    type_ = "float16" if dtype is np.float16 else "float"
    return f"g ({type_}[B,N,8] x) => ({type_}[B,N,8] y) {{ {constants(body, dtype, **more)} {body} }}"


def constants(body: str, dtype: type[np.generic] = np.float32, **more: float) -> str:
    values = {"one": 1, "two": 2, "half": 0.5, "root": ROOT, "slope": SLOPE, "cubic": 0.044715, "three": 3, **more}
    made = ""
    for name in [name for name in values if re.search(rf"\b{name}\b", body)]:
        held = float(np.asarray(values[name], dtype))
        # there is no way to write one of fp16
        to, cast = (f"{name}_32", f"{name} = Cast<to=10>({name}_32)") if dtype is np.float16 else (name, "")
        made += f"{to} = Constant<value_float = {held:.9f}>() {cast} "
    return made


ERF = "u = Div(x, root) e = Erf(u) p = Add(e, one)"
TANH = "c = Pow(x, three) k = Mul(cubic, c) s = Add(x, k) u = Mul(slope, s) t = Tanh(u) p = Add(one, t)"
ORDERS = (
    "h = Mul(half, p) y = Mul(x, h)",
    "h = Mul(p, half) y = Mul(h, x)",
    "h = Mul(x, p) y = Mul(half, h)",
    "h = Mul(p, x) y = Mul(h, half)",
    "h = Mul(x, half) y = Mul(h, p)",
    "h = Mul(half, x) y = Mul(p, h)",
    "h = Div(x, two) y = Mul(h, p)",
    "h = Div(p, two) y = Mul(h, x)",
    "h = Mul(p, x) y = Div(h, two)",
)
STAYS = {
    "quick": ("q = Mul(x, quick) s = Sigmoid(q) y = Mul(x, s)", None),
    "another slope": (
        f"{TANH} {ORDERS[0]}".replace("slope", "other"),
        "Tanh is of 0.8·x + 0.03577·x^3, not of 0.7979·x + 0.03568·x^3 (Tanh → t)",
    ),
    "no cube": (
        f"u = Mul(slope, x) t = Tanh(u) p = Add(one, t) {ORDERS[0]}",
        "Tanh is of 0.7979·x, not of 0.7979·x + 0.03568·x^3 (Tanh → t)",
    ),
    "a fourth power": (
        f"{TANH} {ORDERS[0]}".replace("three", "four"),
        "Tanh is of something else than x, not of 0.7979·x + 0.03568·x^3 (Tanh → t)",
    ),
    "no root": (f"e = Erf(x) p = Add(e, one) {ORDERS[0]}", "Erf is of 1·x, not of 0.7071·x (Erf → e)"),
    "of another value": (
        f"a = Abs(x) {ERF} {ORDERS[0]}".replace("Div(x", "Div(a"),
        "Erf is of something else than x, not of 0.7071·x (Erf → e)",
    ),
    "not halved": (f"{ERF} y = Mul(x, p)", "it is not halved (Erf → e)"),
    "two added": (f"{ERF} {ORDERS[0]}".replace("Add(e, one)", "Add(e, two)"), None),
    "a gate": ("t = Tanh(x) y = Mul(x, t)", None),
}


def test_every_spelling(spelling: Any, check_spelling: Callable[..., None]) -> None:
    check_spelling(spelling, (gelu,), **(HALF if "fp16" in spelling.path.name else {}))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("form", "approximate"), [(ERF, "none"), (TANH, "tanh")])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_orders(
    order: str, form: str, approximate: str, dtype: type[np.generic], fused: Callable[..., ir.Model]
) -> None:
    """Constants of the type that x is of: fp16's are off by up to 1/2048."""
    model = fused(graph(f"{form} {order}", dtype), (gelu,), **(HALF if dtype is np.float16 else {}))
    (node,) = model.graph
    assert (node.op_type, node.attributes.get_string("approximate")) == ("Gelu", approximate)
    assert node.outputs[0].dtype == node.inputs[0].dtype == model.graph.inputs[0].dtype


@pytest.mark.parametrize("name", STAYS)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    body, reason = STAYS[name]
    text = graph(body, quick=1.702, other=0.8, four=4.0)
    assert reasons_left(text, (gelu,)) == ([] if reason is None else [reason])


@pytest.mark.parametrize(("root", "fires"), [(1.41421, True), (1.4142135, True), (1.4140625, False), (1.4, False)])
def test_constants_in_fp32_have_five_digits(root: float, fires: bool, fused: Callable[..., ir.Model]) -> None:
    """√2 as fp16 has it is another constant in an fp32 graph."""
    model = fused(graph(f"{ERF} {ORDERS[0]}", root=root), (gelu,))
    assert Counter(n.op_type for n in model.graph)["Gelu"] == fires


def test_what_is_activated_may_itself_be_scaled(fused: Callable[..., ir.Model]) -> None:
    """A number before it is not part of it."""
    body = f"{ERF} {ORDERS[4]}".replace("(x, ", "(z, ")
    text = graph(f"z = Mul(x, half) {body}")
    assert Counter(n.op_type for n in fused(text, (gelu,)).graph) == {"Gelu": 1, "Mul": 1, "Constant": 1}


def test_a_part_that_is_read_elsewhere_too_stays(fused: Callable[..., ir.Model]) -> None:
    text = graph(f"{ERF} {ORDERS[2].replace('y =', 'g =')} y = Add(g, p)")
    ops = Counter(n.op_type for n in fused(text, (gelu,)).graph)
    assert (ops["Gelu"], ops["Erf"]) == (1, 1)


def test_in_a_local_function(fused: Callable[..., ir.Model]) -> None:
    text = f"""g (float[B,N,8] x) => (float[B,N,8] y) {{ y = local.Activation(x) }}
        <domain: "local", opset_import: ["": 23]>
        Activation (x) => (y) {{ {constants(TANH + ORDERS[0])} {TANH} {ORDERS[0]} }}"""
    (activation,) = fused(text, (gelu,)).functions.values()
    assert [n.op_type for n in activation] == ["Gelu"]
