"""The tokenizer, trained on the corpus, and the corpus as its token ids."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.training.config import BOS, CHAT_TEMPLATE, CONFIG, EOS, SEED


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with DeepSeek's begin and end tokens as ids 0 and 1; encoding adds the begin token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, the config asks for {vocab_size}")
    return tokenizer


def tokenizer_config() -> dict:
    """tokenizer_config.json in the words of the original checkpoints."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def loosen_spaces(tokenizer: Tokenizer, documents: list[np.ndarray]) -> list[np.ndarray]:
    """Write some " word" tokens as " " and "word", so that a prompt may end in a space.

    One in a hundred places, and every third document that begins with a keyword such as `def`.
    """
    vocab, rng = tokenizer.get_vocab(), np.random.default_rng(SEED)
    word_of = {i: vocab[token[1:]] for token, i in vocab.items() if token.startswith("Ġ") and token[1:] in vocab}
    keywords = [vocab[word] for word in ("def", "class", "import", "from")]
    loosened = []
    for ids in documents:
        chosen = rng.random(len(ids)) < 0.01
        chosen[2:3] |= bool(ids[1] in keywords and rng.random() < 1 / 3)
        places = [i for i in np.flatnonzero(chosen) if int(ids[i]) in word_of]
        changed = ids.copy()
        changed[places] = [word_of[int(ids[i])] for i in places]
        loosened.append(np.insert(changed, places, vocab["Ġ"]) if places else ids)
    return loosened


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each document, begin and end tokens included."""
    wrapped = [f"{BOS}{text}{EOS}" for text in texts]
    encodings = tokenizer.encode_batch(wrapped, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
