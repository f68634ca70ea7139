"""Reports: Jinja2 templates, one stylesheet, matplotlib charts."""
