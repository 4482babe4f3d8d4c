"""Video and image bytes to frames and back.

Entry points: `video.decode_frames`, `video.encode_mp4`, `pixels` for resize and tiling.
"""
