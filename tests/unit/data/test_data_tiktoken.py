"""A tiktoken vocabulary becomes a tokenizer.json with the same ids, without code of the release."""

import base64
import json
import random

import pytest
import regex

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.commands import convert
from symbiotic_titan.config.job import JobConfig, Model
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.tiktoken_files import is_tiktoken, tokenizer_json
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.model import model_config
from tests.helpers.released_models import HUNYUAN, args_of
from tests.helpers.tokenizer_files import SENTENCES

WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learned(num_merges=120):
    """Ranks of the bytes in a mixed order and of merges that occur most often in the sentences, as tiktoken's own example learns them."""
    order = list(range(256))
    random.Random(3).shuffle(order)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    words = [
        [bytes([byte]) for byte in word.encode()]
        for sentence in SENTENCES
        for word in WORDS.findall(sentence + " 2027 aaaaaaa aaaa")
    ]
    for _ in range(num_merges):
        pairs = [pair for word in words for pair in zip(word, word[1:], strict=False)]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs.count(pair), pair))
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] + word[i + 1] == left + right:
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


RANKS = learned()


def reference(text):
    """Ids as tiktoken computes them: in each word, the neighbours with the lowest rank together are merged, the first such."""
    ids = []
    for word in WORDS.findall(text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in RANKS:
            parts = [word.encode()]
        while True:
            pairs = [RANKS.get(a + b) for a, b in zip(parts, parts[1:], strict=False)]
            known = [rank for rank in pairs if rank is not None]
            if not known:
                break
            i = pairs.index(min(known))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


def write_vocabulary(folder, name, ranks=RANKS):
    folder.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / name).write_bytes(b"".join(lines))
    return folder / name


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    """The folder of a release with hy.tiktoken, and the tokenizer.json made of it."""
    folder = tmp_path_factory.mktemp("hunyuan")
    file = write_vocabulary(folder, "hy.tiktoken")
    words = ["tokenizer", "--vocabulary", str(file), "--out", str(folder / "tokenizer.json")]
    assert convert.main(words) == 0
    return folder


def test_the_ids_are_those_of_tiktoken(hunyuan):
    opened = open_tokenizer(Tokenizer(kind="huggingface", path=str(hunyuan)))
    chance = random.Random(5)
    alphabet = "abcdehrs <|>'\n\t0129é圆 "
    texts = [*SENTENCES, "", "DON'T stop", "  two\r\n\r\n lines ", "aaaaaaaaaa baaab"]
    texts += ["".join(chance.choices(alphabet, k=40)) for _ in range(200)]
    for text in texts:
        assert opened.encode(text) == reference(text), text
        assert opened.decode(opened.encode(text)) == text
    merged = sum(len(text.encode()) for text in texts) - sum(len(opened.encode(t)) for t in texts)
    assert merged > 1000 and len(RANKS) > 330


def test_a_text_in_another_form_of_unicode_is_composed(hunyuan):
    opened = open_tokenizer(Tokenizer(kind="huggingface", path=str(hunyuan)))
    assert opened.encode("gro\u0308ßer") == reference("größer")


def test_special_tokens_have_the_ids_after_the_ranks(hunyuan):
    content = json.loads((hunyuan / "tokenizer.json").read_text())
    special = [token["content"] for token in content["added_tokens"]]
    assert special[:6] == [
        *("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", "<|extra_0|>")
    ]
    assert len(special) == 210 and special[-1] == "<|extra_204|>"
    ids = [token["id"] for token in content["added_tokens"]]
    assert ids == list(range(len(RANKS), len(RANKS) + 210))
    assert all(token["special"] for token in content["added_tokens"])


def test_reserved_tokens_serve_where_the_vocabulary_fills_the_table(hunyuan, tmp_path):
    """As in Hunyuan-A13B: every embedding has a token, and none is for images."""
    section = Tokenizer(kind="huggingface", path=str(hunyuan))
    opened = open_tokenizer(section)
    size = len(RANKS) + 210
    assert opened.vocab_size == size and opened.added == []
    roles = ["vit_start", "vit", "vit_end", "vae_start", "vae", "vae_end"]
    assert opened.reserved == {r: f"<|extra_{199 + i}|>" for i, r in enumerate(roles)}
    for number, role in enumerate(roles):
        assert getattr(opened.special, role) == size - 6 + number
    assert opened.encode("<|extra_200|>") == reference("<|extra_200|>")
    args = args_of({**HUNYUAN, "vocab_size": size})
    model_config.write_model_config(tmp_path / "model.json", args)
    job = JobConfig(model=Model(flavor=str(tmp_path / "model.json")), tokenizer=section)
    assert build_tokenizer(job).vocab_size == size
    # A token that the user chose, or uses in a turn, is not reserved.
    mine = Tokenizer(
        kind="huggingface",
        path=str(hunyuan),
        special={"vit": "<|extra_204|>"},
        turns={"tool": ["<|extra_203|>", ""]},
    )
    others = open_tokenizer(mine)
    assert others.reserved["vae_end"] == "<|extra_202|>" and "vit" not in others.reserved
    assert others.special.vit == size - 1 and others.added == []


def test_special_tokens_of_a_tokenizer_config_keep_their_ids(tmp_path):
    """Also with gaps between them, under a pattern that is given."""
    first = len(RANKS)
    file = write_vocabulary(tmp_path / "kimi", "tiktoken.model")
    added = {str(first + 3): {"content": "<|im_end|>"}, str(first + 1): {"content": "[BOS]"}}
    config = {"added_tokens_decoder": added}
    (tmp_path / "kimi" / "tokenizer_config.json").write_text(json.dumps(config))
    made = tokenizer_json(file, r"\p{L}+|\P{L}")
    assert made.special == {"[BOS]": first + 1, "<|im_end|>": first + 3}
    (tmp_path / "kimi" / "tokenizer.json").write_text(made.text)
    opened = open_tokenizer(Tokenizer(kind="huggingface", path=str(tmp_path / "kimi")))
    assert (
        opened.special_ids["[BOS]"] == first + 1 and opened.special_ids["<|im_end|>"] == first + 3
    )
    assert opened.encode("ab") == reference("ab")


# ---- mistakes ---------------------------------------------------------------------------------------------------------------


def lines_of(words, capsys):
    assert convert.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its 0 tokens must have the ranks 0, 1, 2 .., each once"),
        (
            b"\x08\x96 garbage here\n",
            "no tiktoken vocabulary: line 1: a token in base64 and its rank",
        ),
        (b'{"model": {}}', "no tiktoken vocabulary: line 1"),
        (b"QQ== 0\nQQ== x\n", "no tiktoken vocabulary: line 2"),
        (b"QQ== 0\nQg== 2\n", "its 2 tokens must have the ranks 0, 1, 2"),
        (b"QQ== 0\nQg== 1\n", "it lacks 254 of the 256 single bytes"),
    ],
)
def test_a_file_of_no_known_kind_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "hy.tiktoken").write_bytes(content)
    file, out = str(tmp_path / "hy.tiktoken"), tmp_path / "tokenizer.json"
    found = lines_of(["tokenizer", "--vocabulary", file, "--out", str(out)], capsys)
    assert f"--vocabulary: {file}: {message}" in found and not out.exists()


def test_what_the_command_cannot_know_is_asked_for(tmp_path, capsys):
    file = write_vocabulary(tmp_path / "other", "other.tiktoken")
    out = tmp_path / "tokenizer.json"
    words = ["tokenizer", "--vocabulary", str(file), "--out", str(out)]
    assert "give the one in the release's Python code as --pattern" in lines_of(words, capsys)
    assert "--pattern: no regular expression" in lines_of([*words, "--pattern", "(("], capsys)
    assert convert.main([*words, "--pattern", r"\S+|\s+"]) == 0
    capsys.readouterr()
    assert "exists; choose another --out" in lines_of([*words, "--pattern", "."], capsys)
    assert "no such file" in lines_of([*words[:2], "nowhere", *words[3:]], capsys)
    (file.parent / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"5": {"content": "x"}}}'
    )
    words = [*words, "--pattern", ".", "--overwrite"]
    assert "special token 'x' has the id 5, which is one of the" in lines_of(words, capsys)
    (file.parent / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json cannot be used" in lines_of(words, capsys)


@pytest.mark.parametrize(
    ("kind", "name", "in_folder"),
    [
        ("huggingface", "hy.tiktoken", True),
        ("huggingface", "hy.tiktoken", False),
        ("huggingface", "tiktoken.model", True),
        ("sentencepiece", "tiktoken.model", True),
    ],
)
def test_a_tiktoken_vocabulary_is_told_with_the_command(tmp_path, kind, name, in_folder):
    file = write_vocabulary(tmp_path / "release", name)
    path = str(file.parent if in_folder else file)
    with pytest.raises(
        ValueError, match="it is a tiktoken vocabulary: .*symbiotic convert tokenizer"
    ) as caught:
        open_tokenizer(Tokenizer(kind=kind, path=path))
    assert "\n" not in str(caught.value)
    assert is_tiktoken(file.read_bytes()) and not is_tiktoken(b"") and not is_tiktoken(b"{}\n{}\n")
