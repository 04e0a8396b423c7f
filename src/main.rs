//! The `husk` binary: a thin shell over the library.
use husk::ExitCode;

fn main() -> ExitCode {
    husk::cli::main(std::env::args_os())
}
