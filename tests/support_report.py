"""Made-up documents of the commands that write reports, with any text in every place that holds one."""

from typing import Any

from doconv_convert.cli.report.render import render

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;\u202e{{ 7 * 7 }}"
COMMANDS = ("fold", "verify", "rehearse", "rehearse many", "to-doconv")


def layer(name: str, **figures: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "DO-Conv",
        "kernel": [3, 3],
        "groups": 1,
        "d_mul": 9,
        "added_parameters": 5184,
        "macs": 115_605_504,
        "d_moved": 0.142,
        "kernel_changed": 0.358,
        **figures,
    }


def proof(layers: list[str], file: str = "m.onnx", finding: str = "a finding") -> dict[str, Any]:
    return {
        "file": file,
        "statuses": [
            {"name": "fold", "state": "passed", "detail": "2 kernels", "findings": []},
            {"name": "graph", "state": "failed", "detail": "the graph is not the original's", "findings": [finding]},
        ],
        "macs": 123_456_789,
        "outputs": [
            {
                "name": layers[0],
                "shape": [3, 10],
                "error": 2.7e-7,
                "plain_error": 1.2e-7,
                "bound": 9.5e-7,
                "largest": 3.1e-6,
                "variation": 0.86,
                "problem": finding,
                "agreeing": None,
            }
        ],
        "sensitivity": {name: 10.0 ** (index % 5 - 1) for index, name in enumerate(layers)},
        "decides": [],
        "proven": False,
        "failed": True,
    }


def rehearsed(source: str, layers: list[str], state: str = "passed") -> dict[str, Any]:
    steps = ["build", "plan", "convert", "randomize", "fold", "save"]
    return {
        "source": source,
        "steps": [
            *({"name": step, "state": "passed", "detail": source, "seconds": 1.25} for step in steps),
            {"name": "prove", "state": state, "detail": source, "seconds": 20.0},
        ],
        "counts": {source: len(layers)},
        "layers": [layer(name, d_moved=None, kernel_changed=None) for name in layers],
        "figures": {"spread": 0.5},
        "exporter": source,
        "dynamic_batch": True,
        "proof": proof(layers, source, source),
        "status": "passed" if state == "passed" else "prove failed",
        "proven": state == "passed",
    }


def document(command: str, text: str, layers: list[str]) -> dict[str, Any]:
    """What `command` prints, with `text` in every place that holds somebody's own words."""
    if command == "fold":
        return {
            "source": {"source": text, "args": {"width": 8}},
            "folded": layers,
            "notes": [text],
            "export": {"opset": 20, "exporter": text, "dynamic_batch": True, "path": text},
            "proof": proof(layers, text, text),
            "proven": False,
            "written": [text],
            "certificate": None,
            "layers": [layer(name) for name in layers],
        }
    if command == "verify":
        return {**proof(layers, text, text), "layers": [layer(name) for name in layers]}
    if command == "rehearse":
        return {"models": [rehearsed(text, layers)]}
    if command == "rehearse many":
        return {"models": [rehearsed(text, layers), rehearsed(f"other {text}", layers, "failed")]}
    total = {"checkpoint_bytes": 1, "sgd_momentum_bytes": 1, "adam_bytes": 2, "composition_macs": 3}
    return {
        "source": {"source": text, "args": {}},
        "plan": {
            "model": text,
            "rows": [{**layer(name), "aliases": [], "action": "keep", "reason": text} for name in layers],
            "not_looked_into": [text],
            "added_parameters": 7,
            "counts": {text: 1},
            "batch": 2,
        },
        "cost": {"batch": 1, "sites": [], "total": {**total, "convolution_macs": 5}},
        "notes": [text],
        "written": text,
    }


def page(command: str, text: str, layers: list[str]) -> str:
    return render(command.split()[0], document(command, text, layers))
