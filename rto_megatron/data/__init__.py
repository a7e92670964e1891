"""From files of text to padded token ids: tokenizers, chat templates, readers, collation, row order."""
