# reproml in environments of its own, on top of that of its locked packages: bin/python has both.
#
#     wheel      the package, built without recipes and golden files, so that a new one rebuilds nothing
#     without    an environment with it
#     itself     the same, with the recipes and golden files of this repository, as pip installs it
{
  lib,
  stdenv,
  runCommand,
  environments,
  python39,
}:
let
  packages = python39.sitePackages;
  version = lib.elemAt (builtins.match ".*__version__ = \"([^\"]+)\".*" (lib.readFile ../reproml/versions.py)) 0;

  meta = {
    description = "Deep learning that is reproducible to the last bit";
    license = lib.licenses.mit;
    mainProgram = "reproml";
    platforms = [
      "aarch64-darwin"
      "aarch64-linux"
      "x86_64-linux"
    ];
  };

  recipes = lib.fileset.toSource {
    root = ../reproml/pipeline/recipes;
    fileset = lib.fileset.fileFilter (file: file.hasExt "toml") ../reproml/pipeline/recipes;
  };
  golden = lib.fileset.toSource {
    root = ../golden;
    fileset = lib.fileset.fileFilter (file: file.hasExt "json") ../golden;
  };

  # setuptools compiles the loops with the C compiler of stdenv.
  wheel = stdenv.mkDerivation {
    pname = "reproml-wheel";
    inherit version meta;
    src = lib.fileset.toSource {
      root = ../.;
      fileset = lib.fileset.unions [
        ../LICENSE
        ../pyproject.toml
        (lib.fileset.difference ../reproml ../reproml/pipeline/recipes)
        ../setup.py
      ];
    };
    NIX_NO_SELF_RPATH = true; # the loops would refer to the wheel's own folder
    env.NIX_CFLAGS_COMPILE = "-g0"; # and to the folder in which they were built
    installPhase = ''
      touch README.md && mkdir golden && touch golden/none.json # which the build asks for
      ${environments.runtime}/bin/python -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir $out .
    '';
  };

  environment =
    suffix: install:
    runCommand "reproml${suffix}-${version}"
      {
        inherit meta;
        PYTHONHASHSEED = 0;
        disallowedReferences = [ wheel ];
        passthru = {
          inherit
            environments
            version
            wheel
            without
            ;
        };
      }
      ''
        ${python39.interpreter} -m venv --without-pip $out
        echo "import site; site.addsitedir('${environments.runtime}/${packages}')" > $out/${packages}/locked.pth
        $out/bin/python -m pip install --no-index --no-deps --no-cache-dir --no-compile ${wheel}/*.whl
        package=$out/${packages}/reproml/pipeline
        rm $package/golden_files/none.json
        ${install}
        $out/bin/python ${./compile.py} $out
        $out/bin/reproml --version
        $out/bin/python -I -c "from reproml.arithmetic.compiler import kernels; assert kernels.library"
      '';
  without = environment "-without-recipes" "";
in
environment "" ''
  mkdir -p $package/recipes
  cp ${recipes}/*.toml $package/recipes
  cp -r ${golden}/* $package/golden_files
''
