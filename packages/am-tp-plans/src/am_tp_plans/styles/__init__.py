"""What plans are made of, beside torch's own styles and those of am-tp-styles."""
