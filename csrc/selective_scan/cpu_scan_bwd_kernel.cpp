#include "selective_scan/scan.h"
namespace scalekern::SCALEKERN_ISA {
int64_t selective_scan_bwd_workspace(const ScanArgs&) { return 0; }
void selective_scan_bwd(const ScanArgs&) {}
}
