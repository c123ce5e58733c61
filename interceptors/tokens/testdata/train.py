"""Makes the small tokenizers of the tests, and what the reference libraries say of some texts.

Run in this folder, with tokenizers 0.23.3 and tiktoken 0.14.0:  python3 train.py
They are trained on the documentation of this repository.
"""

import base64
import glob
import json
import random

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
ADDED = ["<|start|>", "<|end|>", "<|end|><|end|>"]

corpus = [open(f, encoding="utf-8").read() for f in sorted(glob.glob("../../../docs/*.md"))]
corpus += ["日本語のテキスト。中文没有空格的一句话。", "Привет, мир! Это текст.", "नमस्ते दुनिया", "한국어 텍스트", "naïve façade Straße"] * 20


def split(regex):
    return pre_tokenizers.Split(Regex(regex), "isolated")


def bytewise(*before, **options):
    t = Tokenizer(models.BPE(**options))
    t.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    return t, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece():
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = split("▁+[^▁]*")  # for training; a model of this kind has none
    return t, trainers.BpeTrainer(vocab_size=700, limit_alphabet=100, special_tokens=["<unk>"] + ["<0x%02X>" % b for b in range(256)])


def gpt2(splitter):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = splitter
    return t, trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


random.seed(1)
alphabet = ["a", "the", "token", "s", "A", "B", "ß", "'s", "'S", "'ll", "'re", "'", "1", "23", "4567", "½", " ", "  ", "   ", "\n", "\r\n",
            "\n\n", "\t", "\u00a0", "\u3000", "\u2028", "日", "本語", "한국", "ไทย", "हि", "e\u0301", "ǅ", "ʰ", "😀", "!", "!!", "/", "...", "—", "。",
            "_", "\u200b", "\x00", "\x85", "ſ", "<", "<|", "<|start|>", "<|end|>", "<|end|><|end|>", "camelCase", "HTTP", "x" * 40, "=" * 30,
            " " * 50, "ab" * 20, "٠١", "Привет", "▁", "\x7f"]
texts = [""] + alphabet
texts += ["".join(random.choice(alphabet) for _ in range(random.randrange(2, 20))) for _ in range(120)]
for c in corpus[:-100]:
    for _ in range(5):
        at = random.randrange(len(c))
        texts.append(c[at:at + random.randrange(20, 200)])

out = {}
for name, (t, trainer) in {
    "llama": bytewise(split(LLAMA), ignore_merges=True),
    "splits": bytewise(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(WORDS)),
    "sentencepiece": sentencepiece(),
    "gpt2": gpt2(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits": gpt2(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False),
                                            pre_tokenizers.Digits(individual_digits=True)])),
}.items():
    t.train_from_iterator(corpus, trainer)
    if name == "sentencepiece":
        # What the trainer calls special is part of the vocabulary.
        d = json.loads(t.to_str())
        d["added_tokens"] = [a for a in d["added_tokens"] if a["content"] == "<unk>"]
        d["pre_tokenizer"] = None
        t = Tokenizer.from_str(json.dumps(d))
    t.add_tokens([AddedToken(a, normalized=False, special=True) for a in ADDED])
    t.save(name + ".json", pretty=True)
    out[name] = [t.encode(s, add_special_tokens=False).ids for s in texts]

llama = json.load(open("llama.json"))
table = {}
extra = 0
for b in range(256):
    if 32 < b < 127 or 160 < b and b != 173:
        table[chr(b)] = b
    else:
        table[chr(256 + extra)] = b
        extra += 1
ranks = {bytes(table[c] for c in token): rank for token, rank in llama["model"]["vocab"].items()}
with open("ranks.tiktoken", "wb") as f:
    for token, rank in sorted(ranks.items(), key=lambda kv: kv[1]):
        f.write(base64.b64encode(token) + b" %d\n" % rank)
for name, pattern in {"cl100k_base": LLAMA, "o200k_base": O200K,
                      "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}.items():
    e = tiktoken.Encoding(name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    out[name] = [e.encode_ordinary(s) for s in texts]

with open("expected.json", "w", encoding="utf-8") as f:
    json.dump({"texts": texts, "ids": out}, f, ensure_ascii=False, separators=(",", ":"))
