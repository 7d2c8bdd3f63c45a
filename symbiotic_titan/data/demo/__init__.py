"""The demo world: small, real files for the main job, made offline by tools/make_demo_data.py."""
