# The wheels of wheels.json in virtual environments: Nix fetches them, Python's own venv and pip install them.
#
#     runtime        what `pip install reproml[pipeline]` would install, at the versions of requirements.lock
#     development    that, with the tools of tests and lint and torchvision
{
  lib,
  stdenv,
  autoPatchelfHook,
  fetchPypi,
  fetchurl,
  linkFarm,
  python39,
  zlib,
  cuda ? false,
}:
assert lib.versionAtLeast python39.version "3.9.19";
let
  inherit (stdenv.hostPlatform) isLinux system;
  packagesOf = environment: "${environment}/${python39.sitePackages}";

  # NAME-VERSION-PYTHON-ABI-PLATFORM.whl, in the words of fetchPypi.
  fetchLocked =
    file: sha256:
    let
      part = lib.elemAt (lib.splitString "-" (lib.removeSuffix ".whl" file));
    in
    fetchPypi {
      inherit sha256;
      format = "wheel";
      pname = part 0;
      version = part 1;
      dist = part 2;
      python = part 2;
      abi = part 3;
      platform = part 4;
    };

  # On Linux x86_64 the locked PyTorch is the CUDA one. The same version for the CPU alone, a tenth of
  # the size, has its own site; the other systems' locked one is for the CPU anyway.
  fetchCpu =
    file: sha256:
    fetchurl {
      inherit sha256;
      name = file;
      url = "https://download.pytorch.org/whl/cpu/${lib.replaceStrings [ "+" ] [ "%2B" ] file}";
    };
  forCpu = {
    runtime."torch-2.8.0+cpu-cp39-cp39-manylinux_2_28_x86_64.whl" =
      "bda4f93d64dcd9ae5d51844bbccc6fcb7d603522bcc95d256b5fe3bdb9dccca3";
    development."torchvision-0.23.0+cpu-cp39-cp39-manylinux_2_28_x86_64.whl" =
      "c879590294471ffa6dca8ae2115c08351dde3b674fa271dd3b175f2de508a80a";
  };
  needsCuda =
    file:
    lib.any (prefix: lib.hasPrefix prefix file) [
      "nvidia_"
      "torch-"
      "torchvision-"
      "triton-"
    ];

  wheelsOf =
    group:
    let
      locked = (lib.importJSON ./wheels.json).${system}.${group};
    in
    if system == "x86_64-linux" && !cuda then
      lib.mapAttrs fetchLocked (lib.filterAttrs (file: _: !needsCuda file) locked)
      // lib.mapAttrs fetchCpu forCpu.${group}
    else
      lib.mapAttrs fetchLocked locked;

  environment =
    group: below: check:
    let
      wheels = linkFarm "wheels-${group}" (wheelsOf group);
    in
    stdenv.mkDerivation {
      name = "reproml-${group}-${if cuda then "cuda" else "cpu"}";

      # Wheels bring their own libraries but for the C++ runtime and zlib.
      nativeBuildInputs = lib.optional isLinux autoPatchelfHook;
      buildInputs = lib.optionals isLinux [
        stdenv.cc.cc.lib
        zlib
      ];
      # What CUDA opens by name at run time: the libraries' own neighbours, and NixOS's driver.
      appendRunpaths = lib.optionals cuda [
        "$ORIGIN"
        "/run/opengl-driver/lib"
      ];
      # The driver comes with the machine; cuFile's InfiniBand libraries are for those who have InfiniBand.
      autoPatchelfIgnoreMissingDeps = lib.optionals cuda [
        "libcuda.so.1"
        "libibverbs.so.1"
        "libmlx5.so.1"
        "librdmacm.so.1"
      ];

      dontUnpack = true;
      # Leave the files as their wheels have them: pip has seen to the scripts.
      dontPatchShebangs = true;
      dontStrip = true;

      # compile.py makes the tree the same from build to build, and leaves no reference to a wheel in it.
      PYTHONHASHSEED = 0;
      disallowedReferences = [ wheels ] ++ lib.attrValues (wheelsOf group);
      installPhase =
        if below == null then
          ''
            ${python39.interpreter} -m venv $out
            $out/bin/python -m pip install --no-index --no-deps --no-cache-dir --no-compile ${wheels}/*.whl
            $out/bin/python ${./compile.py} $out
          ''
        else
          ''
            ${python39.interpreter} -m venv --without-pip $out
            echo "import site; site.addsitedir('${packagesOf below}')" > $out/${python39.sitePackages}/below.pth
            $out/bin/python -m pip install --no-index --no-deps --no-cache-dir --no-compile ${wheels}/*.whl
            for script in ${below}/bin/*; do # which would start the environment below
              if [ ! -e $out/bin/''${script##*/} ] && head -n 1 $script | grep -q '^#!.*python'; then
                sed "1s|^#!.*|#!$out/bin/python|" $script > $out/bin/''${script##*/}
                chmod +x $out/bin/''${script##*/}
              fi
            done
            $out/bin/python ${./compile.py} $out
          '';
      # torchvision is linked with PyTorch's libraries.
      preFixup = lib.optionalString (isLinux && below != null) ''
        addAutoPatchelfSearchPath ${packagesOf below}/torch/lib
      '';
      doInstallCheck = true;
      installCheckPhase = ''
        $out/bin/python -m pip check
        $out/bin/python -c "import ${check}"
      '';
      meta = {
        description = "Python with the packages that reproml is locked to";
        license = if cuda then lib.licenses.nvidiaCuda else lib.licenses.bsd3;
      };
    };
in
rec {
  runtime = environment "runtime" null "sklearn, torch";
  development = environment "development" runtime "hypothesis, torch, torchvision";
}
