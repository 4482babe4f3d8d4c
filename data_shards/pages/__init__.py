"""The frame that every HTML page shares, and the renderer of Jinja2 templates.

Entry point: `render.render_page`.
"""
