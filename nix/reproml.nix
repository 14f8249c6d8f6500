# reproml installed on top of the environment of its locked packages: bin/python has both.
{
  lib,
  stdenv,
  python,
  python39,
}:
stdenv.mkDerivation {
  name = "reproml";
  # Only what is installed, so that other edits do not cause another training.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../LICENSE
      ../README.md
      ../golden
      ../pyproject.toml
      ../reproml
      ../setup.py
    ];
  };

  # setuptools compiles the kernels with the C compiler of stdenv.
  installPhase = ''
    ${python39.interpreter} -m venv --without-pip $out
    echo "import site; site.addsitedir('${python}/${python39.sitePackages}')" \
      > $out/${python39.sitePackages}/locked.pth
    $out/bin/python -m pip install --no-index --no-deps --no-build-isolation --no-cache-dir .
  '';
  doInstallCheck = true;
  installCheckPhase = ''
    $out/bin/reproml --help
    $out/bin/python -I -c "from reproml.arithmetic import kernels; assert kernels.library"
  '';
  meta.mainProgram = "reproml";
}
