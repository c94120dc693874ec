"""The special tokens, and their ids in every vocabulary."""

SPECIAL_TOKENS = ("<pad>", "<unk>", "<start>", "<end>")
PAD_ID, UNK_ID, START_ID, END_ID = range(4)  # losses and masks rely on padding being 0
