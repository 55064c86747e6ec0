"""The packed script: it does what the readable one does, in fewer bytes, and those count."""

import ast
import hashlib
import importlib.util
import lzma
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, SCRIPT, clean_environment

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import pack  # noqa: E402


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The product, packed by tools/pack.py under its own name."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    command = [sys.executable, str(ROOT / "tools" / "pack.py"), "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{path.stat().st_size:,} bytes for {SCRIPT.stat().st_size:,}" in done.stdout
    assert hashlib.sha256(path.read_bytes()).hexdigest() in done.stdout
    return path


def test_lean_keeps_all_that_runs():
    source = SCRIPT.read_text()
    found = t.lean(source)
    assert ast.dump(ast.parse(found)) == pack.tree_of(source) != ast.dump(ast.parse(source))
    head = ast.get_docstring(ast.parse(source), clean=False)
    assert found.startswith(f'"""{head}"""\nimport argparse\n') and not re.search(r"\n *(#|\n)", found[len(head) :])
    assert found.count('"""') == 4, "the head and the unpacker"
    assert len(found) < 0.75 * len(source) and t.lean(found) == found
    ast.parse(found, feature_version=(3, 10))


@pytest.mark.parametrize("source", [
    "x = '#no'  # yes\n", "# head\n\nx = 1\n# end", "x = 1  # end", "def f():\n    '''doc'''\n", "'''head'''\nx = 1\n",
    "class A:\n\t'doc'  # why\n\n\tb = 2\n\n\tdef f(self):  # f\n\t\t# g\n\t\treturn '''\n\n # kept\n'''\n",
    "x = [  # a\n    1,\n\n    # b\n    2,\n]\nif x:\n    y = 3 \\\n        + 4\n# c\n    z = 5\n",
    "def f(a):\n    return f'{a!r:>{8}} # {{}}' 'b'\n",
    "def f():\n    'a' 'doc of two'\n    return f'''\n # {1 +\n   2}\n'''\n",
    "if 1:\n  def f(): 'doc'\n  x = 1; 'no doc'; y = 2\nelse:\n        pass\n", "def f():\n  'doc';\n  return 1\n",
    "async def f():\n    'doc'\n    async with a as b:\n        # c\n        pass\n", "x = '''a\n  b'''; y = 2  # c\n",
    "def f():\n    x = 1\n\n    '''a string that stands alone'''\n",
    "def f():\n    f'{print(1)}'\n", "\ufeff# first\nx = 1\n", "def f():\n    return 'a\x0bb\u2028c'\n# d\n",
    "", "\n\n", "# only\n", "x = '\u00e9\u2581'  # \u2581\n",
])
def test_lean_cuts_by_tokens(source):
    found = t.lean(source)
    run = {node.name: ast.dump(node) for node in ast.walk(ast.parse(found)) if isinstance(node, ast.FunctionDef)}
    assert run.keys() == {n.name for n in ast.walk(ast.parse(source.encode())) if isinstance(n, ast.FunctionDef)}
    source = source.removeprefix("\ufeff")
    assert pack.same_program(source, found)
    for tree in (before := ast.parse(source), after := ast.parse(found)):  # what stands alone does nothing
        for node in ast.walk(tree):
            if hasattr(node, "body") and isinstance(node.body, list):
                node.body = [n for n in node.body if not isinstance(getattr(n, "value", 0), ast.Constant)
                             or not isinstance(n, ast.Expr)]
    assert ast.dump(before) == ast.dump(after)
    assert len(found) <= len(source) and t.lean(found) == found
    assert t.tokenize.COMMENT not in [token[0] for token in t.tokenize.generate_tokens(t.io.StringIO(found).readline)]


def test_help_and_errors_are_the_same(packed):
    for arguments, variables in (["--help"], {}), (["--hlep"], {}), ([], {"EMA": "0", "LR": "1", "SEED": "x"}):
        said = [subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True,
                               env=clean_environment() | variables) for script in (SCRIPT, packed)]
        assert said[0].returncode == said[1].returncode == (0 if arguments == ["--help"] else 2)
        assert (said[0].stdout, said[0].stderr) == (said[1].stdout, said[1].stderr)


def pythons() -> list[str]:
    """Other Pythons of this machine from 3.10 on, whatever packages they have."""
    found = []
    for minor in range(10, 15):
        managed = sorted(ROOT.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        places = [shutil.which(f"python3.{minor}"), *map(str, managed)]
        for path in filter(None, places):
            done = subprocess.run([path, "-c", "import lzma"], capture_output=True)
            if done.returncode == 0 and minor != sys.version_info[1]:
                found.append(path)
                break
    return found


def test_on_every_python_at_hand(packed):
    """It packs to the same lines, unpacks, answers --help and finds a typo."""
    others = pythons()
    if not others:
        pytest.skip("no other Python from 3.10 on is here")
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True).stdout
    source = SCRIPT.read_text()
    function = source[source.index("\ndef lean(") :].split("\n\n\n")[0]
    program = (f"import io, itertools, sys, tokenize\n{function}\n"
               "sys.stdout.write(lean(open(sys.argv[1], encoding='utf-8').read()))")
    for path in others:
        env = clean_environment() | {"PYTHONUTF8": "1"}
        done = subprocess.run([path, str(packed), "--help"], capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout) == (0, shown), (path, done.stderr)
        done = subprocess.run([path, str(packed)], capture_output=True, text=True, env=env | {"EMA": "0"})
        assert done.returncode == 2 and done.stderr.startswith("error: EMA: no such variable"), (path, done.stderr)
        done = subprocess.run([path, "-c", program, str(SCRIPT)], capture_output=True, text=True, env=env)
        assert done.stdout == t.lean(source), (path, done.stderr)


def test_a_packed_run_is_the_readable_one(launch, packed, tmp_path):
    """Also on two ranks under torchrun, bit for bit; each leaves and counts the same file."""
    settings = {"CODE_BYTES": "UNSET", "EXPORT_FILL": 1, "ARTIFACT_LIMIT_BYTES": packed.stat().st_size + 30_000,
                "SEED": 3}
    plain = launch(run_id="plain", **settings)
    short = launch(run_id="short", script=packed, **settings)
    two = launch(run_id="two", script=packed, ranks=2, torchrun=("--standalone", "--local-addr=127.0.0.1"), **settings)
    for run in (plain, short, two):
        assert run.code == 0, run.err
        left = (run.folder / t.PACKED_NAME).read_bytes()
        assert left == packed.read_bytes() and run.summary["artifact"]["bytes_code"] == len(left)
        total = len(left) + len(run.artifact)
        assert f"\nCode size (compressed): {len(left)} bytes\n" in run.out
        assert f"\nTotal submission size int6+zstd: {total} bytes\n" in run.out
        assert total <= settings["ARTIFACT_LIMIT_BYTES"] < total + 300, "the room that packing leaves is filled"
        log = (run.folder / "train.log").read_text()
        assert f"code counted: {len(left)} bytes, sha256 {hashlib.sha256(left).hexdigest()}\n" in log
    assert plain.artifact == short.artifact and plain.summary["eval"].keys() == short.summary["eval"].keys()
    assert plain.summary["val_bpb"] == short.summary["val_bpb"]
    assert (plain.folder / "train.log").read_text().startswith(SCRIPT.read_text() + "=" * 100)
    assert (short.folder / "train.log").read_text().startswith(t.lean(SCRIPT.read_text()) + "=" * 100)
    assert f"\nCode size (uncompressed): {SCRIPT.stat().st_size} bytes\n" in plain.out
    assert plain.summary["artifact"]["bytes_source"] == SCRIPT.stat().st_size


def test_code_bytes_raw_counts_the_file(launch):
    run = launch()
    assert f"\nCode size: {SCRIPT.stat().st_size} bytes\n" in run.out and not (run.folder / t.PACKED_NAME).exists()


def test_a_resumed_run_keeps_what_it_counted(launch, start):
    """Even where this lzma would give other bytes; another script is packed anew."""
    first = start(ITERATIONS=400, CODE_BYTES="packed")
    first.until("step:2/")
    first.process.send_signal(2)
    assert first.end().code == 130, first.err
    path = first.folder / t.PACKED_NAME
    text = t.lean(SCRIPT.read_text()).encode()
    other = (t.UNPACKER % t.base64.b85encode(lzma.compress(text, preset=0)).decode()).encode()
    assert len(other) > path.stat().st_size
    path.write_bytes(other)
    again = launch(RESUME=1, ITERATIONS=400, MAX_WALLCLOCK_SECONDS=1, CODE_BYTES="packed")
    assert again.code == 0, again.err
    assert path.read_bytes() == other and again.summary["artifact"]["bytes_code"] == len(other)
    assert t.read_script(t.Config(), path).counted == other
    path.write_bytes((t.UNPACKER % t.base64.b85encode(lzma.compress(b"x = 1\n")).decode()).encode())
    assert t.read_script(t.Config(), path).counted == t.pack_script(SCRIPT.read_bytes())


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tracebacks_show_the_lines(tmp_path):
    (tmp_path / "long.py").write_text(textwrap.dedent('''\
        """What --help shows."""
        import traceback  # to show


        def fail(x):
            """Divides."""
            # by zero
            return x / 0


        if __name__ == "__main__":
            try:
                fail(1)
            except ZeroDivisionError:
                traceback.print_exc()
            fail(2)
        '''))
    assert pack.main([str(tmp_path / "long.py"), "--out", str(tmp_path / "short.py")]) == 0
    done = subprocess.run([sys.executable, str(tmp_path / "short.py")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("in fail\n    return x / 0") == 2, done.stderr
    assert done.stderr.count("short.py:unpacked\", line 5, in fail") == 2 and "fail(2)\n" in done.stderr, done.stderr
    assert "What --help shows" not in done.stderr, "the line that unpacks is shown as it is"
    module = load(tmp_path / "short.py")
    assert module.__doc__ == "What --help shows." or module.UNPACKED.startswith('"""What --help shows."""')
    assert module.fail.__code__.co_filename == f"{tmp_path / 'short.py'}:unpacked"
    assert sys.excepthook is sys.__excepthook__, "an import leaves it alone"


def test_triton_finds_its_kernel(packed):
    if t.triton is None:
        pytest.skip("no Triton here")
    module = load(packed)
    plain = ast.parse(textwrap.dedent("".join(t.squared_relu_product.raw_src)))
    short = ast.parse(textwrap.dedent("".join(module.squared_relu_product.raw_src)))
    assert pack.tree_of(ast.unparse(plain)) == ast.dump(ast.parse(ast.unparse(short)))


def test_what_packing_would_change_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text("x = 1  # one\n")
    monkeypatch.setattr(t, "lean", lambda source: source.replace("1", "2"))
    assert pack.main([str(tmp_path / "a.py")]) == 2 and "would not be the same program" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.py"]
    assert not pack.same_program("x = 1", "x = (") and pack.same_program("def f():\n  'd'\n", "def f():\n 0\n")


def test_pack_says_what_to_mend(tmp_path, packed, capsys):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "new.py").write_text("try:\n    pass\nexcept* ValueError:\n    pass\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "more.py").write_bytes(packed.read_bytes().replace(b"exec(", b"x=1;exec("))
    for arguments, words in (
            (["nowhere.py"], "nowhere.py: No such file"), ([tmp_path / "broken.py"], "not a script for Python 3.10"),
            ([tmp_path / "new.py"], "not a script for Python 3.10"), ([packed], "is packed already"),
            (["--unpack", SCRIPT], "is not packed, or damaged"), ([SCRIPT, "--out", SCRIPT], "choose another --out"),
            (["--unpack", packed, "--out", "x"], "takes no --out"), ([tmp_path / "latin.py"], "not UTF-8"),
            (["--unpack", tmp_path / "more.py"], "is not packed, or damaged")):
        assert pack.main([*map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and said.startswith("error: "), said
    damaged = tmp_path / "damaged.py"
    damaged.write_bytes(packed.read_bytes().replace(b'PACKED="', b'PACKED="0000', 1))
    assert pack.main(["--unpack", str(damaged)]) == 2
    for a, b in ((b"exec(compile(UNPACKED", b"exec(compile(unpacked"), (b"import base64", b"import Base64")):
        assert packed.read_bytes().count(a) == 1 and t.unpack_script(packed.read_bytes().replace(a, b)) == b""
    assert t.unpack_script(packed.read_bytes()) == t.lean(SCRIPT.read_text()).encode()
    assert pack.main(["--unpack", str(packed)]) == 0 and capsys.readouterr().out == t.lean(SCRIPT.read_text())
    kept = ["broken.py", "damaged.py", "latin.py", "more.py", "new.py"]
    assert sorted(os.listdir(tmp_path)) == kept, "nothing half-written stays"
