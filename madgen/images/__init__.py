"""Operations on single images: embedded metadata, masks and pixel scores. Uses numpy and Pillow only."""
