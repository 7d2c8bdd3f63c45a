"""[tokenizer]: how text becomes ids, and which special tokens surround documents, images and the turns of a conversation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from symbiotic_titan.config.rows import NAME, PATH_OR_NONE, TEXT, unknown_key_message
from symbiotic_titan.registry import Registry, choice


@dataclass(frozen=True)
class TokenFamily:
    """The special tokens and turns of a family of tokenizers, or those with what the user set."""

    special: dict[str, str]
    """Role -> token. Roles are the fields of SpecialTokens."""

    turn_tokens: tuple[str, ...]
    """Further special tokens, for use in ``turns`` and ``turn_separator``."""

    turns: dict[str, list[str]]
    """Role of a speaker -> [before, after] the text of a turn; ``{eos}`` is the token of that role."""

    turn_separator: str
    """What separates two turns."""

    opening: str = "{bos}"
    """What every document begins with."""

    signs: tuple[str, ...] = ()
    """Tokens that tell the family: a vocabulary of this family has all of them."""

    prefers_declared: bool = False
    """Prefer the file's own bos, eos and pad."""

    reserved: str = ""
    """Regular expression for tokens that the released model was not trained with. The last of them serve the roles whose tokens the
    file lacks: they have embeddings already, where the vocabulary fills the table."""

    @property
    def tokens(self) -> list[str]:
        """Every special token once, in the order in which those that a file lacks get their ids."""
        return list(dict.fromkeys((*self.special.values(), *self.turn_tokens)))


# The names that the byte tokenizer gives its own tokens.
PLAIN = TokenFamily(
    special={
        "pad": "<pad>",
        "bos": "<bos>",
        "eos": "<eos>",
        "vit_start": "<vit_start>",
        "vit": "<vit>",
        "vit_end": "<vit_end>",
        "vae_start": "<vae_start>",
        "vae": "<vae>",
        "vae_end": "<vae_end>",
    },
    turn_tokens=("<user>", "<assistant>"),
    turns={"system": ["", ""], "user": ["<user>", ""], "assistant": ["<assistant>", "{eos}"]},
    turn_separator="",
    prefers_declared=True,
)

# No released backbone generates images: these tokens are ours.
_GENERATION = {
    "vae_start": "<|generation_start|>",
    "vae": "<|generation_pad|>",
    "vae_end": "<|generation_end|>",
}

# Qwen2.5, Qwen3 and their VL models, with turns in ChatML. They have no token that begins a document: in their pre-training
# <|endoftext|> comes before a text.
QWEN = TokenFamily(
    special={
        "pad": "<|endoftext|>",
        "bos": "<|endoftext|>",
        "eos": "<|endoftext|>",
        "vit_start": "<|vision_start|>",
        "vit": "<|image_pad|>",
        "vit_end": "<|vision_end|>",
        **_GENERATION,
    },
    turn_tokens=("<|im_start|>", "<|im_end|>"),
    turns={
        role: [f"<|im_start|>{role}\n", "<|im_end|>"] for role in ("system", "user", "assistant")
    },
    turn_separator="\n",
    signs=("<|im_start|>",),
)

# Aria, with turns in ChatML too.
ARIA = replace(
    QWEN,
    special={
        "pad": "<pad>",
        "bos": "<s>",
        "eos": "</s>",
        "vit_start": "<fim_prefix>",
        "vit": "<|img|>",
        "vit_end": "<fim_suffix>",
        **_GENERATION,
    },
    signs=("<|im_start|>", "<|img|>", "<fim_prefix>"),
    prefers_declared=True,
)

# GLM-4.5V. An answer ends with the <|user|> of the next turn, which does not repeat it. An answer has no <think></think> before
# it: write that into [tokenizer.turns] where it is wanted.
GLM = TokenFamily(
    special={
        "pad": "<|endoftext|>",
        "bos": "<sop>",
        "eos": "<|endoftext|>",
        "vit_start": "<|begin_of_image|>",
        "vit": "<|image|>",
        "vit_end": "<|end_of_image|>",
        **_GENERATION,
    },
    turn_tokens=("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>"),
    turns={
        "system": ["<|system|>\n", ""],
        "user": ["<|user|>\n", ""],
        "assistant": ["<|assistant|>\n", "<|user|>"],
    },
    turn_separator="",
    opening="[gMASK]{bos}",
    signs=("[gMASK]", "<sop>", "<|user|>"),
)

# ERNIE 4.5 VL. Turns are marked by words, and an image has no "Picture 1:" before it: write that, or <think></think> before an answer,
# into [tokenizer.turns] or the data where it is wanted.
ERNIE = TokenFamily(
    special={
        "pad": "<unk>",
        "bos": "<|begin_of_sentence|>",
        "eos": "</s>",
        "vit_start": "<|IMAGE_START|>",
        "vit": "<|IMAGE_PLACEHOLDER|>",
        "vit_end": "<|IMAGE_END|>",
        **_GENERATION,
    },
    turn_tokens=("<|end_of_sentence|>",),
    turns={
        "system": ["", "\n"],
        "user": ["User: ", "\n"],
        "assistant": ["Assistant: ", "<|end_of_sentence|>"],
    },
    turn_separator="",
    signs=("<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>"),
)

# Hunyuan-A13B, a text model: its special tokens for images are ours. Every user's turn begins like a document; in the released
# template the one after a system's turn does not.
HUNYUAN = TokenFamily(
    special={
        **PLAIN.special,
        "pad": "<|pad|>",
        "bos": "<|startoftext|>",
        "eos": "<|eos|>",
        **_GENERATION,
    },
    turn_tokens=("<|extra_0|>", "<|extra_4|>"),
    turns={
        "system": ["<|startoftext|>", "<|extra_4|>"],
        "user": ["<|startoftext|>", "<|extra_0|>"],
        "assistant": ["", "{eos}"],
    },
    turn_separator="",
    signs=("<|startoftext|>", "<|extra_4|>"),
    # Of 205, the first few have a use in the released model.
    reserved=r"<\|extra_\d\d+\|>",
)

TOKEN_FAMILIES: Registry[TokenFamily] = Registry("tokenizer.family")
TOKEN_FAMILIES.register("aria", ARIA)
TOKEN_FAMILIES.register("qwen", QWEN)
TOKEN_FAMILIES.register("glm", GLM)
TOKEN_FAMILIES.register("ernie", ERNIE)
TOKEN_FAMILIES.register("hunyuan", HUNYUAN)
TOKEN_FAMILIES.register("plain", PLAIN)
# ``tokenizer.family``: whichever family's signs the file has.
AUTO = "auto"

# Name -> function of [tokenizer] that opens a tokenizer, see ``data.tokenizer``.
TOKENIZER_KINDS: Registry[Callable[..., Any]] = Registry(
    "tokenizer.kind",
    {
        "bytes": "symbiotic_titan.data.tokenizer:open_bytes",
        "huggingface": "symbiotic_titan.data.tokenizer:open_huggingface",
        "sentencepiece": "symbiotic_titan.data.tokenizer:open_sentencepiece",
    },
)


@dataclass
class Tokenizer:
    kind: str = choice(TOKENIZER_KINDS, "bytes")
    """``bytes``: one token per byte, needs no file; ``huggingface``: a ``tokenizer.json``; ``sentencepiece``: a ``.model``"""

    path: Annotated[str, PATH_OR_NONE] = ""
    """The file, or the folder that holds it. Nothing is downloaded."""

    family: Annotated[str, NAME] = AUTO
    """Whose special tokens and turns are the defaults: ``qwen`` (ChatML and <|vision_start|>), ``aria``, ``glm`` (GLM-4.5V),
    ``ernie`` (ERNIE 4.5 VL), ``hunyuan`` (Hunyuan-A13B), or ``plain`` (<user>, <vit_start> and so on; begin, end and padding as the
    file declares them). ``auto``: the one whose tokens the file has, e.g. qwen with <|im_start|>, else plain."""

    special: Annotated[dict[str, str], tyro.conf.Fixed, TEXT] = field(default_factory=dict)
    """[tokenizer.special]: role = "token", for roles whose token is not the family's: pad, bos, eos, vit_start, vit, vit_end,
    vae_start, vae, vae_end. A token that the file lacks is added after its vocabulary."""

    turns: Annotated[dict[str, list[str]], tyro.conf.Fixed, TEXT] = field(default_factory=dict)
    """[tokenizer.turns]: role = ["before", "after"], what surrounds a turn of system, user, assistant or a role of yours.
    Special tokens in it count as such, ``{eos}`` is the token of that role, the rest is text. What comes after an assistant's
    turn is trained with it; a turn that begins with the same tokens does not repeat them. A chat template beside the file is not
    run: it does not say which of its tokens to train."""

    turn_tokens: Annotated[list[str], TEXT] = field(default_factory=list)
    """Further special tokens that ``turns`` uses; those that the file lacks are added after its vocabulary."""

    turn_separator: Annotated[str | None, TEXT] = None
    """What separates two turns, never trained; None means the family's"""

    def __post_init__(self) -> None:
        if self.family != AUTO:
            TOKEN_FAMILIES.check("tokenizer.family", self.family)
        for role in self.special:
            if role not in PLAIN.special:
                raise ValueError(
                    unknown_key_message("tokenizer.special", role, list(PLAIN.special))
                )
        for role, strings in self.turns.items():
            if len(strings) != 2:
                raise ValueError(
                    f"tokenizer.turns.{role}: must be two strings, before and after the text, got {strings!r}"
                )
        for token in (*self.special.values(), *self.turn_tokens):
            if len(token) < 2:
                raise ValueError(
                    f"tokenizer: a special token must have at least two characters, got {token!r}"
                )

    def refuse_file_settings(self) -> None:
        """For a kind without a file: refuse the settings that would have no effect.

        Raises:
            ValueError: names the first that is set.
        """
        for name in ("path", "family", "special", "turns", "turn_tokens", "turn_separator"):
            if getattr(self, name) not in ("", AUTO, {}, [], None):
                raise ValueError(
                    f"tokenizer.{name}: has no effect with tokenizer.kind = {self.kind!r}; remove it, or choose a kind that reads "
                    "a file, such as 'huggingface'"
                )

    def adapted(self, family: TokenFamily) -> TokenFamily:
        """``family`` with what the user set.

        Raises:
            ValueError: a token of images has two roles.
        """
        special = family.special | self.special
        turns = {
            role: [text.replace("{eos}", special["eos"]) for text in around]
            for role, around in (family.turns | self.turns).items()
        }
        separator = family.turn_separator if self.turn_separator is None else self.turn_separator
        opening = family.opening.replace("{bos}", special["bos"])
        strings = [opening, separator, *(text for turn in turns.values() for text in turn)]
        used = [token for token in family.turn_tokens if any(token in text for text in strings)]
        _check_roles(special, [*used, *self.turn_tokens])
        return TokenFamily(special, (*used, *self.turn_tokens), turns, separator, opening)


def _check_roles(special: dict[str, str], turn_tokens: list[str]) -> None:
    """pad, bos and eos may share a token with each other and with turns; a token of images may have no other role."""
    for role, token in special.items():
        others = [name for name, other in special.items() if other == token and name != role]
        if token in turn_tokens:
            others.append("turn_tokens")
        if others and role not in ("pad", "bos", "eos"):
            raise ValueError(
                f"tokenizer.special.{role}: {token!r} serves {others[0]} as well; give it a token of its own"
            )
