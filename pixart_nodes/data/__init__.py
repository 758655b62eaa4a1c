"""Samples: pictures, captions, sizes."""
