"""`import exactune` is free and changes nothing anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import exactune

PUBLIC = ["ExactuneError", "FastLanguageModel", "FastModel", "__version__", "accelerate", "is_bfloat16_supported", "undo"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_surface():
    assert sorted(exactune.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(exactune, name) is not None


def test_importing_loads_none_of_the_stack():
    loaded = run("import sys, exactune; print([m for m in ('torch', 'transformers', 'peft', 'trl', 'triton') if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_using_it_leaves_the_stack_untouched():
    """Every attribute of every class and module of the stack that is loaded is the same object after resolving all our public names."""
    code = """
import json, sys
import torch, transformers, peft, trl
from transformers import LlamaForCausalLM, Trainer
from trl import SFTTrainer
import bitsandbytes
def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] in ('torch', 'transformers', 'peft', 'trl', 'bitsandbytes') and module is not None:
            for key, value in list(vars(module).items()):
                if not key.startswith('__'):
                    seen[name, key] = id(value)
                    if isinstance(value, type):
                        seen.update({(name, key, k): id(v) for k, v in vars(value).items() if not k.startswith('__') or k == '__init__'})
    return seen
before = snapshot()
import exactune
for name in exactune.__all__: getattr(exactune, name)
after = snapshot()
lazy = lambda key: key[1] in ('_modules', '_objects', '_import_structure')
changed = [k for k in before if k in after and before[k] != after[k] and not lazy(k)]
gone = [k for k in before if k not in after]
print(json.dumps([len(before), changed, gone]))
"""
    count, changed, gone = json.loads(run(code))
    assert count > 10_000
    assert not changed and not gone


def test_typed():
    assert (Path(exactune.__file__).parent / "py.typed").exists()
