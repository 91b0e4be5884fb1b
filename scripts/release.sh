#!/usr/bin/env bash
# What is published of a version, in dist/: wheel and source, checked; a wheelhouse of it; a bill of materials of what is in
# that (CycloneDX); SHA256SUMS of all, signed where FEDSP_SIGNING_KEY names a key of GnuPG. Fails unless the tag vVERSION
# stands on this commit, the tree is clean, and CHANGELOG.md and CITATION.cff speak of the version.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin tools=.venv-release/bin
version=$($bin/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
fail() { echo "release: $1" >&2; exit 2; }
[ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed: commit them, or put them aside"
git tag --points-at HEAD | grep -qx "v$version" || fail "this commit has no tag v$version: \`git tag v$version\`, or set the version in pyproject.toml"
grep -Eq "^## ${version//./\\.}( |$)" CHANGELOG.md || fail "CHANGELOG.md has no section '## $version'"
grep -Fxq "version: $version" CITATION.cff || fail "CITATION.cff is not of version $version"
rm -rf dist
$tools/python -m build .
$tools/python -m twine check --strict dist/*
$bin/python scripts/wheelhouse.py dist/wheelhouse
sh deploy/containers/install.sh dist/wheelhouse dist/installed
$tools/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.cdx.json dist/installed/bin/python
rm -r dist/installed
(cd dist && find . -type f ! -name 'SHA256SUMS*' | sort | xargs sha256sum > SHA256SUMS)
if [ -n "${FEDSP_SIGNING_KEY:-}" ]; then
    gpg --batch --yes --local-user "$FEDSP_SIGNING_KEY" --armor --detach-sign dist/SHA256SUMS
else
    echo "release: SHA256SUMS is not signed: name a key of GnuPG in FEDSP_SIGNING_KEY"
fi
echo "fedsp $version is in dist/"
