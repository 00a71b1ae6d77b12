"""Masks as text and as pictures, what is refused, and the command line."""

import struct
import zlib

import pytest
import torch
from test_masks import _one_thread, pytestmark, tiles_of  # noqa: F401 (one thread here, too, and not in the interpreter's process)

from scalekern import masks
from scalekern.__main__ import main
from scalekern.masks import causal, segments, sink, window

@pytest.mark.parametrize(
    "text, mask",
    [
        ("causal & (window(256, 0) | sink(4))", causal & (window(256, 0) | sink(4))),
        ("~causal.shift(-1, dk=2).transpose()", ~causal.shift(-1, 2).transpose()),
        ("per_head([causal, window(left=None, right=-1)])", masks.per_head([causal, window(-1, -1)])),
        ("tiles([(0, 1), (2, 2)], (8, 16)) | dense([[True, False]])", None),
        ("segments(cu_seqlens=[0, 2, 5])", segments([0, 0, 1, 1, 1])),
    ],
)
def test_parse(text, mask):
    parsed = masks.parse(text)
    assert masks.parse(repr(parsed)) == parsed and mask in (None, parsed)


@pytest.mark.parametrize(
    "text, message",
    [
        ("causal &", "text must be a mask expression, got 'causal &'"),
        ("window", "got 'window', which needs arguments"),
        ("full", "name must be one of blocks, causal"),
        ("__import__('os')", "name must be one of"),
        ("causal.__class__", "text must be made of masks"),
        ("causal.to_dense(3, 3)", "text must be made of masks"),
        ("(lambda: causal)()", "text must be made of masks"),
        ("causal + sink(1)", "text must be made of masks"),
        ("causal & 3", "operand must be a mask, got 'causal & 3'"),
        ("sink(2 ** 9)", "text must be made of masks"),
        ("sink(*[1])", "text must be made of masks"),
        ("sink(-1)", "sink: n must be an integer from 0"),
        ("(" * 9000 + "causal" + ")" * 9000, "text must be a mask expression"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(").replace("*", r"\*")):
        masks.parse(text)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: window(-2, 0), ValueError, "window: left must be an integer from -1 .*, got -2"),
        (lambda: window(0, 1.5), TypeError, "window: right must be an integer.*, got float"),
        (lambda: masks.prefix([3, -1]), ValueError, "prefix: lengths must be an integer from 0 .*, got -1"),
        (lambda: masks.blocks([4, 4]), ValueError, r"blocks: ends must be rising .*, got \[4, 4\]"),
        (lambda: masks.blocks("ab"), TypeError, "blocks: ends must be a tensor or lists of integers, got a str"),
        (lambda: segments(), ValueError, "segments: expected one of ids and cu_seqlens"),
        (lambda: segments(torch.rand(3)), TypeError, "segments: ids must be made of integers, got float32"),
        (lambda: segments([[0], [1]], [[0]] * 3), ValueError, "kv_ids must have 1 or 2 batches like ids, got 3"),
        (lambda: segments(cu_seqlens=[1, 2]), ValueError, r"cu_seqlens must rise from 0, got \[1, 2\]"),
        (lambda: masks.dilated(0), ValueError, "dilated: step must be an integer from 1"),
        (lambda: masks.window2d(4, 2), TypeError, "window2d: hw must be a pair of integers, got 4"),
        (lambda: masks.neighborhood((4, 4), 0), ValueError, "neighborhood: kernel must be an integer from 1"),
        (lambda: masks.dense(torch.ones(3, 3)), TypeError, "dense: allowed must be made of bool, got float32"),
        (lambda: masks.dense([True]), ValueError, r"dense: allowed must have 2 or 4 dimensions, got shape \(1,\)"),
        (lambda: masks.tiles([(0, -1)], 8), ValueError, "tiles: pairs must not be negative"),
        (lambda: masks.per_head([]), ValueError, "per_head: masks must not be empty"),
        (lambda: masks.per_head([causal, 3]), TypeError, r"per_head: masks\[1\] must be a mask, got int"),
        (lambda: masks.per_head([masks.per_head([causal] * 3), causal]), ValueError, "must tell 1 or 2 heads"),
        (lambda: masks.prefix([1, 2]) & masks.prefix([1, 2, 3]), ValueError, r"must agree in batches, got \[2, 3\]"),
        (lambda: causal.shift(2**30, 0), ValueError, "shift: dq must be an integer from -536870912"),
        (lambda: causal.plan(5, -1), ValueError, "plan: kv_len must be an integer from 0"),
        (lambda: causal.plan(5, 5, (0, 1)), ValueError, "plan: block must be"),
        (lambda: masks.plan_of(torch.zeros(3), 1, 1), TypeError, "plan: code must be an int32 tensor"),
        (lambda: causal.tile(3, 3, 0, 1), ValueError, "tile: .* must not be empty"),
        (lambda: causal.tile(0.0, 1, 0, 1), TypeError, "tile: q0 must be an integer, got float"),
        (lambda: causal.row("a", 4), TypeError, "row: q must be an integer, got str"),
        (lambda: masks.per_head([causal] * 2).row(0, 4, 0, 2), ValueError, "row: head must be an integer from 0 to 1"),
        (lambda: masks.prefix([1, 2]).row(0, 4, 2), ValueError, "row: batch must be an integer from 0 to 1"),
        (lambda: causal.plan(5, 5, 2.0), ValueError, r"plan: block must be .*, got \(2.0,\)"),
        (lambda: masks.tiles(None, 8), TypeError, "tiles: pairs must be a tensor or lists of integers"),
        (lambda: masks.tiles([1, 2], 8), ValueError, r"tiles: pairs must have shape \(n, 2\), got \(2,\)"),
        (lambda: masks.per_head(causal), TypeError, "per_head: masks must be a list of masks, got Causal"),
        (lambda: causal.save_png("m.png", 8.5, 8), ValueError, "save_png: q_len and kv_len must be integers"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_pictures_show_the_plan(tmp_path):
    mask = masks.per_head([causal, window(40, 0), causal])
    expected = tiles_of(mask.to_dense(200, 130), (32, 16))
    panels = dict(part.split("\n", 1) for part in mask.show(200, 130, block=(32, 16)).split("\n\n"))
    assert list(panels) == ["head 0 2", "head 1"]
    for h, title in enumerate(("head 0 2", "head 1")):
        assert panels[title].split("\n") == ["".join(".+#"[c] for c in row) for row in expected[0, h].tolist()]
    assert max(map(len, causal.show(5000, 5000, width=40).split("\n"))) == 40
    assert "\x1b[38;5;25m#" in causal.show(9, 9, color=True)
    mask.save_png(tmp_path / "m.png", 200, 130, block=(32, 16))
    data = (tmp_path / "m.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and [p.name for p in tmp_path.iterdir()] == ["m.png"]
    chunks, at = {}, 8
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        chunks[name] = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + chunks[name])
        at += 12 + size
    wide, high = struct.unpack(">II", chunks[b"IHDR"][:8])
    image = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(high, wide + 1)[:, 1:]
    scale = (high - 16) // 7
    for h in range(3):
        panel = image[8 : 8 + 7 * scale, h * (wide // 3) + 8 :][:, : 9 * scale]
        assert torch.equal(panel[::scale, ::scale], expected[0, h])


def test_command_line(tmp_path, capsys):
    png = tmp_path / "m.png"
    assert main(["masks", "causal & (window(256, 0) | sink(4))", "--length", "2048", "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG") and "causal & (window(256, 0) | sink(4))" in out
    plan = (causal & (window(256, 0) | sink(4))).plan(2048, 2048)
    rows = {line.split("  ")[0]: line.split()[-1] for line in out.split("\n") if line.strip()}
    assert [rows[f"{kind} tiles"] for kind in ("full", "partial")] == [str(n) for n in plan.tiles[:2]]
    assert len([line for line in out.split("\n") if set(line) <= set(".+#") and len(line) == 16]) == 16
    assert main(["masks", "causal", "--length", "100", "--kv-length", "5000", "--block", "16x32"]) == 0
    assert "100 x 5000" in capsys.readouterr().out
    assert main(["masks", "causl"]) == 1
    assert "masks: parse: name must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["masks", "causal", "--block", "0"])
