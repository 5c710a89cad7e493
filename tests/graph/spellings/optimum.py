"""Fixtures that optimum writes: SD3 and FLUX.1, which are the transformers it exports.

    python tests/graph/spellings/optimum.py

Optimum pins its own transformers and diffusers, so this runs in an environment of its own:

    pip install torch==2.13.0 optimum==2.1.0 optimum-onnx==0.1.0 diffusers==0.39.0 transformers==4.57.6 \
        onnx==1.23.2 onnxscript==0.7.2

It calls what `optimum-cli export onnx` calls for the transformer of a pipeline. What PyTorch calls in these models is
counted by whole_models.py, which writes the other fixtures and the index.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.remove(str(HERE))  # this file has the name of what it is about

import diffusers  # noqa: E402
import onnx  # noqa: E402
import optimum.exporters.onnx.model_configs  # noqa: E402, F401 (registers them)
import torch  # noqa: E402
from optimum.exporters.onnx.convert import export_pytorch  # noqa: E402
from optimum.exporters.tasks import TasksManager  # noqa: E402

sys.path.append(str(HERE))
from make import bare  # noqa: E402
from whole_models import FIXTURES, OPTIMUM, TINY, file_name  # noqa: E402
from without_weights import strip, write  # noqa: E402


def export(class_name: str, config: dict[str, Any], opset: int) -> onnx.ModelProto:
    """One model as optimum writes it."""
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**config).eval()
    kind = {"SD3Transformer2DModel": "sd3-transformer-2d", "FluxTransformer2DModel": "flux-transformer-2d"}[class_name]
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=kind, library_name="diffusers", task="semantic-segmentation"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_pytorch(model, constructor(model.config, int_dtype="int64", float_dtype="fp32"), opset, path)
        return onnx.load(path)


def main() -> None:
    """Write them."""
    for name, exporter, opset in OPTIMUM:
        tiny = TINY[name]
        model = strip(bare(export(tiny.class_name, dict(tiny.config), opset)))
        write(model, FIXTURES / file_name(name, exporter, opset))


if __name__ == "__main__":
    main()
