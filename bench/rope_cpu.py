"""RoPE in ONNX Runtime on CPU: spelled out, as ai.onnx's RotaryEmbedding and as com.microsoft's, in fp32.

    python bench/rope_cpu.py                                     1101 and 4173 tokens, 24 heads of 128, 2 threads
    python bench/rope_cpu.py --tokens 1101 --threads 1 --rounds 5

Q as it comes from its norm, [B, N, H, D], turned by cosines and sines [N, D/2]. The least that any of them can do is to
read Q and write it: timed as a copy, which is the ceiling. Rivals are interleaved.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
import onnx.parser
import onnxruntime
from measure import interleaved, p50_p90, write_result

BATCH, HEADS, HEAD_DIM = 1, 24, 128
_SIGNATURE = "(float[B,N,H,D] x, float[N,P] cos, float[N,P] sin) => (float[B,N,H,D] y)"
_FLAT = "flat = Constant <value_ints = [0, 0, {C}]> () x3 = Reshape (x, flat)"
_DEEP = "deep = Constant <value_ints = [0, 0, {H}, {D}]> () y = Reshape (y3, deep)"
_OPS = {
    # the ceiling: one read and one write
    "copy": "two = Constant <value_float = 2.0> () y = Mul (x, two)",
    "spelled out": """
        pairs = Constant <value_ints = [0, 0, {H}, {P}, 2]> () x5 = Reshape (x, pairs)
        last = Constant <value_ints = [-1]> () head = Constant <value_ints = [1]> ()
        even1, odd1 = Split <axis = -1, num_outputs = 2> (x5)
        even = Squeeze (even1, last) odd = Squeeze (odd1, last)
        c = Unsqueeze (cos, head) s = Unsqueeze (sin, head)
        ec = Mul (even, c) os = Mul (odd, s) oc = Mul (odd, c) es = Mul (even, s)
        re = Sub (ec, os) im = Add (oc, es)
        re1 = Unsqueeze (re, last) im1 = Unsqueeze (im, last)
        y5 = Concat <axis = -1> (re1, im1)
        deep = Constant <value_ints = [0, 0, {H}, {D}]> () y = Reshape (y5, deep)""",
    "ai.onnx": f"""{_FLAT}
        batch = Shape <end = 2> (x) one = Constant <value_ints = [1]> ()
        shape = Concat <axis = 0> (batch, one)
        c = Expand (cos, shape) s = Expand (sin, shape)
        y3 = RotaryEmbedding <interleaved = 1, num_heads = {{H}}> (x3, c, s)
        {_DEEP}""",
    "com.microsoft": f"""{_FLAT}
        first = Constant <value_ints = [0]> ()
        y3 = com.microsoft.RotaryEmbedding <interleaved = 1, num_heads = {{H}}> (x3, first, cos, sin)
        {_DEEP}""",
}


def session(body: str, threads: int) -> onnxruntime.InferenceSession:
    """One op's graph, with the optimizations that a user gets."""
    sizes = {"H": HEADS, "D": HEAD_DIM, "P": HEAD_DIM // 2, "C": HEADS * HEAD_DIM}
    signature = _SIGNATURE
    for name in ("H", "D", "P"):
        signature = signature.replace(f",{name}]", f",{sizes[name]}]").replace(f",{name},", f",{sizes[name]},")
    header = '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>'
    model = onnx.parser.parse_model(f"{header} g {signature} {{ {body.format(**sizes)} }}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(tokens: int, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Times of each in milliseconds, and how far its numbers are from those spelled out.

    The least is the figure to compare: where a machine is shared, all else is other people's work.
    """
    generator = np.random.default_rng(0)
    angles = generator.uniform(0, 100, (tokens, HEAD_DIM // 2))
    x = generator.standard_normal((BATCH, tokens, HEADS, HEAD_DIM), dtype=np.float32)
    feeds = {"x": x, "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    rivals = {name: functools.partial(session(body, threads).run, None, feeds) for name, body in _OPS.items()}
    outputs = {name: run()[0] for name, run in rivals.items()}
    results = {}
    for name, seconds in interleaved(rivals, rounds).items():
        p50, p90 = p50_p90(seconds)
        far = float(np.abs(outputs[name] - outputs["spelled out"]).max())
        times = {"min_ms": min(seconds), "p50_ms": p50, "p90_ms": p90}
        results[name] = {**{what: round(1000 * t, 2) for what, t in times.items()}, "max_difference": far}
    del results["copy"]["max_difference"]  # it computes something else
    return results


def main() -> None:
    """Parse arguments, measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1101, 4173])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    results = {}
    for tokens in arguments.tokens:
        results[tokens] = found = measure(tokens, arguments.threads, arguments.rounds)
        print(f"{tokens} tokens × {HEADS} heads × {HEAD_DIM}, {arguments.threads} threads: least, p50, p90 in ms")
        for name, of in found.items():
            ratio = of["min_ms"] / found["spelled out"]["min_ms"]
            print(f"  {name:14}{of['min_ms']:8.2f}{of['p50_ms']:8.2f}{of['p90_ms']:8.2f}  {ratio:5.2f} × spelled out")
    write_result("rope_cpu", {"threads": arguments.threads, "heads": HEADS, "head_dim": HEAD_DIM, "tokens": results})


if __name__ == "__main__":
    main()
