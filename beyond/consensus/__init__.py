"""The caption that agrees best with the captions of similar training images."""
