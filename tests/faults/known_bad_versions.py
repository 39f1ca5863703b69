"""Versions of what this suite stands on, directly or not, that must not be installed, and why.

To add one: the package, the versions that are bad, where it is told, and what it does to somebody who uses this suite. The test beside
this file compares the pins, the lock and the floors of pyproject.toml's ranges. scripts/audit.sh asks the public database for the rest.
"""

KNOWN_BAD = [
    ("torch", "<2.6", "CVE-2025-32434", "torch.load(weights_only=True) runs code from a crafted file"),
    ("torch", "<2.10", "CVE-2026-24747", "torch.load(weights_only=True) corrupts memory on a crafted file"),
    ("transformers", "<4.48", "CVE-2024-11392, CVE-2024-11393, CVE-2024-11394", "pickles of some models run code when they are loaded"),
    ("transformers", "<4.53", "CVE-2025-6638 and others", "regular expressions in tokenizers that take for ever"),
    ("gradio", "<5", "CVE-2024-47167", "the server fetches addresses that a visitor names (/queue/join)"),
    ("gradio", "<6.6", "CVE-2026-28416", "the server fetches addresses that a loaded page names (gr.load)"),
    ("gradio", "<6.7", "CVE-2026-28414", "files outside of the page's folders can be read (Windows)"),
    ("starlette", "<0.47.2", "CVE-2025-54121", "a large upload blocks every other request"),
    ("starlette", ">=0.39,<0.49.1", "CVE-2025-62727", "a Range header takes quadratic time"),
    ("starlette", ">=0.8.3,<1.0.1", "CVE-2026-48710", "a Host header changes the path that is checked"),
    ("python-multipart", "<0.0.18", "CVE-2024-53981", "a form with many line breaks blocks the server"),
    ("h11", "<0.16", "CVE-2025-43859", "a lenient chunked body lets requests be smuggled"),
    ("jinja2", "<3.1.6", "CVE-2025-27516, CVE-2024-56201", "a template leaves the sandbox: chat templates come from anybody"),
    ("pyarrow", ">=0.14,<14.0.1", "CVE-2023-47248", "an Arrow or Parquet file runs code when it is read"),
    ("pyyaml", "<5.4", "CVE-2020-14343", "full_load runs code"),
    ("pydantic", ">=2,<2.4", "CVE-2024-3772", "a regular expression that takes for ever"),
    ("requests", "<2.32.4", "CVE-2024-47081", "sends the credentials of .netrc to another host"),
    ("urllib3", "<2.5", "CVE-2025-50181", "follows redirects that were switched off"),
    ("urllib3", "<2.6", "CVE-2025-66418, CVE-2025-66471", "a small compressed answer fills the memory"),
    ("aiohttp", "<3.10.11", "CVE-2024-52304", "requests can be smuggled"),
    ("aiohttp", "<3.14.1", "CVE-2026-54278", "a small compressed body fills the memory"),
    ("pillow", "<10.3", "CVE-2024-28219", "a buffer overflow"),
    ("pillow", ">=11.2,<11.3", "CVE-2025-48379", "a buffer overflow where DDS pictures are written"),
    ("certifi", "<2024.7.4", "CVE-2024-39689", "trusts an authority that was withdrawn"),
    ("idna", "<3.7", "CVE-2024-3651", "a name that takes quadratic time"),
    ("tqdm", "<4.66.3", "CVE-2024-34062", "options of its command line are run as code"),
    ("setuptools", "<78.1.1", "CVE-2025-47273", "writes outside of its folder"),
    ("protobuf", ">=6,<6.31.1", "CVE-2025-4565", "a nested message ends the process"),
    ("werkzeug", "<3.0.6", "CVE-2024-49766, CVE-2024-49767", "leaves its folder on Windows; forms fill the memory"),
    ("nltk", "<3.9", "CVE-2024-39705", "opens pickles of packages that it fetches"),
    ("scikit-learn", "<1.5", "CVE-2024-5206", "keeps words of its training data"),
    ("fonttools", ">=4.33,<4.60.2", "CVE-2025-66034", "writes files that a font's description names"),
    ("filelock", "<3.20.3", "CVE-2025-68146, CVE-2026-22701", "follows a symbolic link that appears beside its check"),
]
"""(package, bad versions, where it is told, why)."""
