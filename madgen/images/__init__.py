"""Operations on single images: encoding, masks, crops and pixel scores. Uses numpy and Pillow only."""
