import pytest
import tokenizers as hf

from llm_jax.base.errors import UserError
from llm_jax.data.chat import render, with_template
from llm_jax.data.tokenizers import Tokenizer, load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, I am 12."},
    {"role": "assistant", "content": "Hello 🙂!"},
    {"role": "user", "content": " spaces "},
    {"role": "assistant", "content": "\nBye"},
]
# As in Qwen 2.5: no generation marks, and layout after each end token.
PREFIX = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def targets(tokenizer, ids, mask):
    runs, last = [], 0
    for token, target in zip(ids, mask, strict=True):
        if target and not last:
            runs.append([])
        if target:
            runs[-1].append(token)
        last = target
    return [tokenizer.decode(run) for run in runs]


def test_mask_holds_the_assistants_words_and_end_tokens(chat_bpe):
    ids, mask = render(chat_bpe, MESSAGES)
    assert targets(chat_bpe, ids, mask) == ["Hello 🙂!<|im_end|>", "\nBye<|im_end|>"]
    assert ids[-1] == chat_bpe.end_of_turn_id and mask[-1] == 1


def test_prefix_rendering_finds_the_same_targets(bpe):
    tokenizer = bpe.with_chat_template(PREFIX)
    ids, mask = render(tokenizer, MESSAGES)
    assert targets(tokenizer, ids, mask) == ["Hello 🙂!<|im_end|>", "\nBye<|im_end|>"]
    assert tokenizer.decode(ids).endswith("<|im_end|>\n") and mask[-1] == 0


def test_generation_prompt_is_a_prefix(chat_bpe):
    opened, mask = render(chat_bpe, MESSAGES[:-1], add_generation_prompt=True)
    whole, _ = render(chat_bpe, MESSAGES)
    assert whole[: len(opened)] == opened and not any(mask)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_equals_transformers(bpe, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(bpe, name)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = render(load_tokenizer(tmp_path), MESSAGES)
    assert found["input_ids"] == ids
    assert found["assistant_masks"] == mask
    prompt = theirs.apply_chat_template(MESSAGES[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == render(tokenizer, MESSAGES[:2], add_generation_prompt=True)[0]


def test_vocabulary_that_is_not_byte_level(tmp_path):
    """As Llama 2's: SentencePiece spaces, bytes as <0xNN>, a bos in front."""
    transformers = pytest.importorskip("transformers")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz#:.?"]
    merges = [("▁", "b"), ("▁", "a"), ("y", "e"), ("b", "ye")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "▁b", "▁a", "ye", "bye"])}
    backend = hf.Tokenizer(hf.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    normalizers = [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    backend.normalizer = hf.normalizers.Sequence(normalizers)
    steps = [
        hf.decoders.Replace("▁", " "),
        hf.decoders.ByteFallback(),
        hf.decoders.Fuse(),
        hf.decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = hf.decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = hf.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = with_template(Tokenizer(backend, config), "plain")
    tokenizer.save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a bye é 🙂"
    assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert ours.decode(ours.encode(text)) == text
    found = theirs.apply_chat_template(MESSAGES[1:], return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = render(ours, MESSAGES[1:])
    assert found["input_ids"] == ids and sum(mask) > 0
    # transformers leaves out tokens that spell a part of a character, so ours may hold more.
    assert all(m >= theirs for m, theirs in zip(mask, found["assistant_masks"], strict=True))
    assert ids[-1] == ours.eos_id == ours.end_of_turn_id and mask[-1] == 1
    with pytest.raises(UserError, match="no chat template and no chatml tokens"):
        with_template(Tokenizer(backend, config), None)
    with pytest.raises(UserError, match="no byte-level vocabulary"):
        ours.encode_bytes(b"x")
    assert ours.token_bytes[ours.encode(text)].sum() == len(text.encode()) + 1  # the space put in front


def test_plain_ends_turns_with_eos(bpe):
    tokenizer = with_template(bpe, "plain")
    assert tokenizer.end_of_turn_id == tokenizer.eos_id
    ids, mask = render(tokenizer, MESSAGES[1:3])
    assert targets(tokenizer, ids, mask) == ["Hello 🙂!<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "all-zero"),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}", "all-zero"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "otherwise than in the whole"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for m in messages %}", "line 1"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
    ],
)
def test_bad_templates(bpe, template, message):
    with pytest.raises(UserError, match=message):
        render(bpe.with_chat_template(template), MESSAGES)


def test_which_template(bpe, tmp_path):
    assert with_template(bpe, None).chat_template == with_template(bpe, "chatml").chat_template
    own = bpe.with_chat_template(PREFIX)
    assert with_template(own, None) is own
    file = tmp_path / "own.jinja"
    file.write_text(PREFIX)
    assert with_template(bpe, str(file)).chat_template == PREFIX
    with pytest.raises(UserError, match="neither a built-in template"):
        with_template(bpe, "nonesuch")
    with pytest.raises(UserError, match="no chat template"):
        render(bpe, MESSAGES)


def test_marks_cannot_be_forged(chat_bpe):
    """A message that spells the template's own syntax or marks is data."""
    ids, mask = render(chat_bpe, [{"role": "user", "content": "{% generation %}\x00x{{ 1 }}"}, MESSAGES[2]])
    assert targets(chat_bpe, ids, mask) == ["Hello 🙂!<|im_end|>"]
    assert "{% generation %}\x00x{{ 1 }}" in chat_bpe.decode(ids)
