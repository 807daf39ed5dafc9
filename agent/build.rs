//! Compiles `shim/` for the target with the same compiler, and offers its path to `include_bytes!` as
//! `FORESHORE_SHIM`.
//!
//! It is not a dependency because it has no std, its own panic handler and its own entry point, and because
//! no C toolchain may be needed for it: it is linked by the linker that comes with Rust, so that
//! `--target aarch64-unknown-linux-musl` works on any machine with that target installed.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=shim/src");
    println!("cargo::rustc-check-cfg=cfg(foreshore_shim)");

    let target = env::var("TARGET")?;
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("foreshore-shim");
    if !matches!(arch.as_str(), "x86_64" | "aarch64") {
        // The agent still builds; it says at run time that it cannot start containers here.
        return Ok(());
    }
    // 64-bit ARM kernels have pages of 4, 16 (Raspberry Pi 5) or 64 KiB, and refuse a program whose segments do not
    // fit theirs.
    let page = if arch == "aarch64" { 65_536 } else { 4096 };
    let output = Command::new(env::var("RUSTC")?)
        .args([
            "shim/src/main.rs",
            "--crate-name=foreshore_shim",
            "--crate-type=bin",
            "--edition=2024",
        ])
        .arg("--target")
        .arg(&target)
        .arg("-o")
        .arg(&out)
        .args([
            "-C",
            "opt-level=s",
            "-C",
            "panic=abort",
            "-C",
            "debuginfo=0",
            "-C",
            "strip=symbols",
        ])
        .args([
            "-C",
            "overflow-checks=off",
            "-C",
            "debug-assertions=off",
            "-C",
            "codegen-units=1",
        ])
        .args([
            "-C",
            "relocation-model=static",
            "-C",
            "target-feature=+crt-static",
        ])
        .args([
            "-C",
            "linker-flavor=ld.lld",
            "-C",
            "linker=rust-lld",
            "-C",
            "link-self-contained=no",
        ])
        .args(["-C", "link-arg=-static", "-C", "link-arg=--build-id=none"])
        .arg("-C")
        .arg(format!("link-arg=-zmax-page-size={page}"))
        .args([
            "-C",
            "link-arg=--no-dynamic-linker",
            "-C",
            "default-linker-libraries=no",
        ])
        .args([
            "-C",
            "link-arg=--no-eh-frame-hdr",
            "-C",
            "link-arg=-znorelro",
            "-C",
            "force-unwind-tables=no",
        ])
        // The core library that comes with Rust is built to unwind; nothing here ever does.
        .args(["-C", "link-arg=--defsym=rust_eh_personality=0"])
        .output()?;
    if !output.status.success() {
        return Err(format!(
            "failed to compile agent/shim for {target}:\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    println!("cargo::rustc-cfg=foreshore_shim");
    println!("cargo::rustc-env=FORESHORE_SHIM={}", out.display());
    Ok(())
}
