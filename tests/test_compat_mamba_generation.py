"""mamba_ssm's language model under compat.install: decoding, sampling, checkpoints."""

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from compat_mamba_lm import ABSENT, KINDS, build, tokens, upstream
from compat_shims import shims  # noqa: F401

from scalekern.testing import assert_close

pytestmark = ABSENT


@KINDS
@pytest.mark.parametrize("length", [1, 7])
def test_greedy_decoding_is_the_argmax_of_the_whole(kind, length):
    model, ids = build(kind), tokens(length=length)
    out = model.generate(
        input_ids=ids, max_length=20, cg=True, top_k=1, return_dict_in_generate=True, output_scores=True
    )
    with torch.no_grad():
        full = model(out.sequences).logits[:, length - 1 : -1]
    assert torch.equal(out.sequences[:, :length], ids) and torch.equal(out.sequences[:, length:], full.argmax(-1))
    assert len(out.scores) == 20 - length and len(out.sequences.unique()) > 3
    assert_close(torch.stack(out.scores, 1), full, tolerance=1e-5)
    assert out["sequences"] is out[0] and out["scores"] is out[1]
    assert torch.equal(model.generate(ids, 20), out.sequences)  # what it returns can be trained on:
    model(out.sequences).logits.sum().backward()


@KINDS
def test_pieces_of_a_sequence(kind):
    """A cache continues with any number of tokens, in the rows that batch_size_offset names."""
    model, ids = build(kind), tokens(length=13)
    params = upstream("utils.generation.InferenceParams")(max_seqlen=13, max_batch_size=3, batch_size_offset=1)
    params.key_value_memory_dict.update(model.allocate_inference_cache(3, 13))
    with torch.no_grad():
        full = model(ids).logits
        for begin, end in ((0, 5), (5, 6), (6, 9), (9, 13)):
            params.seqlen_offset = begin
            out = model(ids[:, begin:end], inference_params=params).logits
            assert_close(out, full[:, begin:end], tolerance=1e-5)
    for layer in params.key_value_memory_dict.values():
        assert all((state[0] == 0).all() for state in layer if state is not None)


def test_packed_prompts_with_padding_behind_them():
    """As upstream's varlen generation: seq_idx beside cu_seqlens, which ends before the padding."""
    model, ids = build("mamba2"), tokens(1, 14)
    bounds, seq_idx = torch.tensor([0, 5, 11]), torch.tensor([[0] * 5 + [1] * 6 + [-1] * 3], dtype=torch.int32)
    params = upstream("utils.generation.InferenceParams")(max_seqlen=20, max_batch_size=2)
    with torch.no_grad():
        out = model(ids, inference_params=params, seq_idx=seq_idx, cu_seqlens=bounds).logits
        assert out.shape == (1, 14, 24)
        for begin, end in ((0, 5), (5, 11)):
            assert_close(out[:, begin:end], model(ids[:, begin:end]).logits, tolerance=1e-5)
        params.seqlen_offset += 1
        step = model(torch.tensor([[3], [4]]), inference_params=params).logits
        assert_close(step[1:], model(F.pad(ids[:, 5:11], (0, 1), value=4)).logits[:, -1:], tolerance=1e-5)


class Scripted(torch.nn.Module):
    """A model whose most likely tokens are known: row r's token at place t is script[r][t]. It checks its caller."""

    def __init__(self, script, vocabulary=12):
        super().__init__()
        self.script, self.vocabulary, self.seen = torch.tensor(script), vocabulary, []

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        offset = inference_params.seqlen_offset
        assert num_last_tokens == 1 and inference_params.max_seqlen == 8
        assert position_ids is None if offset == 0 else position_ids.tolist() == [[offset]] * len(input_ids)
        self.seen.append(input_ids.clone())
        logits = F.one_hot(self.script[:, offset + input_ids.shape[1]], self.vocabulary).float()
        return types.SimpleNamespace(logits=logits[:, None])


class Streamer:
    def __init__(self):
        self.put_in, self.ended = [], False

    def put(self, value):
        self.put_in.append(value.clone())

    def end(self):
        self.ended = True


def test_decoding_stops_when_every_row_has_had_its_eos(capsys):
    decode, streamer = upstream("utils.generation.decode"), Streamer()
    model = Scripted([[1, 2, 9, 3, 9, 4, 5, 6], [1, 2, 3, 4, 5, 9, 6, 7]])
    prompt = torch.tensor([[1, 9], [1, 2]])  # an eos in the prompt ends nothing
    out = decode(prompt, model, 8, eos_token_id=9, streamer=streamer, output_scores=True, enable_timing=True)
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")
    assert out.sequences.tolist() == [[1, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9]] and len(out.scores) == 4
    assert streamer.ended and torch.equal(torch.cat(streamer.put_in, 1), out.sequences)
    assert torch.equal(torch.cat(model.seen, 1), out.sequences[:, :-1])
    assert decode(prompt, model, 8).sequences[0].tolist() == [1, 9, 9, 3, 9, 4, 5, 6]
    assert decode(prompt, model, 8).scores == ()


def test_teacher_outputs_and_the_vocabulary():
    decode = upstream("utils.generation.decode")
    model = Scripted([[1, 2, 9, 3, 9, 4, 5, 6]])
    teacher = torch.tensor([[1, 2, 7, 7, 8]])
    assert decode(teacher[:, :2], model, 8, teacher_outputs=teacher).sequences.tolist() == [[1, 2, 7, 7, 8, 4, 5, 6]]
    assert decode(teacher[:, :2], model, 8, vocab_size=5).sequences[0].tolist() == [1, 2, 0, 3, 0, 4, 0, 0]
    for length in (0, 8):
        with pytest.raises(ValueError, match=f"the prompt must have 1 to max_length - 1 = 7 tokens, got {length}"):
            decode(torch.zeros(1, length, dtype=torch.long), model, 8)


LOGITS = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -9.0]
PERMUTATION = [3, 7, 0, 5, 1, 6, 2, 4]  # not sorted: a place in the order is not a token
SAMPLINGS = {  # the options, and the places in the order that they leave
    "all": (dict(top_k=0), 8),
    "hot": (dict(top_k=0, temperature=2.0), 8),
    "top_k": (dict(top_k=3, temperature=0.5), 3),
    "more than there are": (dict(top_k=99, top_p=1.0), 8),
    "top_p": (dict(top_k=0, top_p=0.5), 2),  # probabilities .40 .24 .15 .09 .05 .03 .02
    "top_p of a hot one": (dict(top_k=0, top_p=0.5, temperature=2.0), 3),
    "top_k, then top_p": (dict(top_k=3, top_p=0.5), 1),  # .51 .31 .19
    "min_p": (dict(top_k=0, min_p=0.3), 3),  # 1 .61 .37 .22 of the first
    "min_p beside top_k": (dict(top_k=6, min_p=0.2), 4),
    "all three": (dict(top_k=6, top_p=0.9, min_p=0.3), 3),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampling(name):
    sample, (options, kept) = upstream("utils.generation.sample"), SAMPLINGS[name]
    places, draws = torch.tensor(PERMUTATION), 4000
    logits = torch.empty(8).scatter(0, places, torch.tensor(LOGITS)).expand(draws, 8)
    before = logits.clone()
    torch.manual_seed(0)
    found = sample(logits, **options)
    torch.manual_seed(0)
    assert torch.equal(found, sample(logits, **options)) and torch.equal(logits, before)
    counts = torch.bincount(found, minlength=8)[places] / draws
    expected = F.pad((torch.tensor(LOGITS[:kept]) / options.get("temperature", 1.0)).softmax(0), (0, 8 - kept))
    assert (counts[kept:] == 0).all()
    assert (counts - expected).abs().max() < 0.03  # 4 standard deviations of a share of 4000 draws


def test_sampling_one_and_nonsense():
    sample = upstream("utils.generation.sample")
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample(logits, top_p=0.9, temperature=3.0), logits.argmax(-1))
    for options in (dict(temperature=0.0), dict(top_p=1.1), dict(min_p=-0.1)):
        with pytest.raises(ValueError, match="sample: temperature must be positive"):
            sample(logits, top_k=4, **options)


def test_sampled_generation():
    model, ids = build(), tokens(3, 4)
    options = dict(max_length=16, top_k=4, top_p=0.8, temperature=1.5, return_dict_in_generate=True, output_scores=True)
    torch.manual_seed(5)
    out = model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **options).sequences, out.sequences)
    assert not torch.equal(model.generate(ids, **options).sequences, out.sequences)
    for token, scores in zip(out.sequences[:, 4:].T, out.scores):
        assert (scores.gather(1, token[:, None]) >= scores.topk(4, -1).values[:, -1:]).all()


def test_repetition_penalty():
    model, ids = build(), tokens(3, 4)
    out = model.generate(ids, 16, repetition_penalty=1.7, return_dict_in_generate=True, output_scores=True)
    changed = 0
    for place, scores in enumerate(out.scores, 4):
        for row, logits in zip(out.sequences, scores):
            seen = torch.isin(torch.arange(24), row[:place])
            expected = torch.where(seen, torch.where(logits < 0, logits * 1.7, logits / 1.7), logits)
            changed += int(expected.argmax() != logits.argmax())
            assert row[place] == expected.argmax()
    assert changed

    def model(input_ids, **kwargs):  # a seen token's negative logit is multiplied
        return types.SimpleNamespace(logits=torch.tensor([-1.0, -1.5, -1.8, -3.2]).expand(1, 1, 4))

    out = upstream("utils.generation.decode")(torch.tensor([[0]]), model, 5, repetition_penalty=2.0)
    assert out.sequences.tolist() == [[0, 1, 2, 0, 0]]  # the logits were -2, -3 and -3.6 when each had been there


@KINDS
def test_round_trip(kind, tmp_path):
    model, ids = build(kind), tokens()
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(f.name for f in (tmp_path / "new/folder").iterdir()) == ["config.json", "pytorch_model.bin"]
    again = type(model).from_pretrained(str(tmp_path / "new/folder"))
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "new/folder")  # over what it was read from
    half = type(model).from_pretrained(tmp_path / "new/folder", device="cpu", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    for name, p in half.named_parameters():  # A and D stay in float32 as they were saved
        dtype = torch.float32 if name.endswith(("A_log", ".D")) else torch.bfloat16
        assert p.dtype == dtype and torch.equal(p, model.get_parameter(name).to(dtype))


def test_a_folder_with_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, ids = build(), tokens()
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}  # a tied tensor once
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        type(model).from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(model.config)))
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    loaded = upstream("utils.hf.load_state_dict_hf")(tmp_path, dtype=torch.float16)
    assert {t.dtype for t in loaded.values()} == {torch.float16}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no pytorch_model.bin and no model.safetensors"):
        type(model).from_pretrained(tmp_path)


def test_a_folder_of_somebody_else(tmp_path):
    LM = upstream("models.mixer_seq_simple.MambaLMHeadModel")
    (tmp_path / "config.json").write_text(json.dumps(dict(hidden_size=16, state_size=4)))
    with pytest.raises(ValueError, match="is not mamba_ssm's: MambaConfig has no hidden_size, state_size"):
        LM.from_pretrained(tmp_path)


def test_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model, asked = build("mamba2"), []
    model.save_pretrained(tmp_path)

    def download(name, file):
        asked.append((name, file))
        if not (tmp_path / file).exists():
            raise hub.errors.EntryNotFoundError(f"{file} is not there")
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert torch.equal(type(model).from_pretrained("some/model")(tokens()).logits, model(tokens()).logits)
    assert asked == [("some/model", "config.json"), ("some/model", "pytorch_model.bin")]
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no folder some/model, and nothing from the hub: pytorch_model.bin is"):
        type(model).from_pretrained("some/model")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no folder not/a/folder, and nothing from the hub"):
        type(model).from_pretrained("not/a/folder")  # nor a name of the hub: nothing is asked for
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="no folder some/model; a name of the hub needs huggingface_hub"):
        type(model).from_pretrained("some/model")
