"""Decoding and augmentation for training with OpenCV (DATA.BACKEND cv2), on uint8 arrays instead of Pillow images."""
