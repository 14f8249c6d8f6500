# The development shell. It works from every folder of a checkout, and imports that checkout in place.
{
  mkShell,
  writeShellScriptBin,
  git,
  nixfmt-rfc-style,
  environments,
  mnist,
}:
mkShell {
  packages = [
    environments.development
    git
    nixfmt-rfc-style
    (writeShellScriptBin "reproml" ''exec python -m reproml "$@"'')
  ];
  REPROML_DATA_DIR = mnist;
  # PYTHONPATH has the checkout and nothing of the user's. The compiled loops are built into the checkout.
  shellHook = ''
    unset PYTHONPATH
    top="$(git rev-parse --show-toplevel 2> /dev/null || pwd)"
    if [ -e "$top/reproml/arithmetic/csrc" ]; then
      export PYTHONPATH="$top"
      (cd "$top" && python setup.py --quiet build_ext --inplace)
    else
      echo "reproml: this is no checkout; change to one and start the shell again" >&2
    fi
  '';
}
